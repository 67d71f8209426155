// Launches of the CUDA kernels, for the operators: plain C++ over the runtime's stream.
#pragma once

#include <cuda_runtime.h>

#include "../arguments.h"

namespace rodimus {

// Keys of a state that the step kernels hold in registers.
constexpr int64_t kMaxKeys = 128;

// Columns of a state one block carries: narrow while there are few blocks, wide when there are many.
inline int64_t step_columns(int64_t rows) { return rows <= 4 ? 32 : 128; }

// Floats of scratch memory for a mixer step.
inline int64_t mixer_scratch(const MixerStep& a) {
  int64_t columns = step_columns(a.rows);
  return a.rows * (a.value_dim + (a.value_dim + columns - 1) / columns);
}

void launch_ddts_step(const DdtsStep& a, cudaStream_t stream);
void launch_mixer_step(const MixerStep& a, cudaStream_t stream);
void launch_conv_step(const ConvStep& a, cudaStream_t stream);
void launch_linear(const Linear& a, cudaStream_t stream);
void launch_norm(const Norm& a, cudaStream_t stream);

}  // namespace rodimus
