// The kernels of a block's parts, emulated as a GPU would launch them.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/ddts_step.cuh"
#include "cuda/kernels.h"
#include "cuda/step_linear.cuh"

namespace rodimus {

inline unsigned blocks_for(int64_t size, int64_t per_block) {
  return static_cast<unsigned>((size + per_block - 1) / per_block);
}

// The shared memory of launches that ask for so many bytes a block: NaN, whatever is read before it is
// written, and nothing is written beyond.
class SharedOf {
 public:
  explicit SharedOf(int64_t bytes) : bytes_(bytes) {
    memset(emulator::dynamic_shared, 0xff, sizeof emulator::dynamic_shared);
  }
  ~SharedOf() {
    for (size_t i = bytes_; i < sizeof emulator::dynamic_shared; ++i) {
      if (i % emulator::kShared == 0) i += bytes_;
      if (emulator::dynamic_shared[i] == '\xff') continue;
      fprintf(stderr, "shared memory is written beyond %zu bytes\n", bytes_);
      abort();
    }
  }

 private:
  size_t bytes_;
};

// The kernel that a GPU of so many multiprocessors would launch.
inline void run_step_linear(StepLinear a, int64_t processors) {
  StepLinearLaunch how = step_linear_launch(a, processors);
  a.together = how.together;
  SharedOf shared(how.staged);
  auto run = [&](void (*kernel)(StepLinear)) {
    emulator::launch(dim3(all_tiles(a)), how.warps * kWarp, [&] { kernel(a); });
  };
  if (how.scaled)
    run(how.scaled == 1 ? step_linear_kernel<8, 2, 4, 1> : step_linear_kernel<8, 2, 4, kMaxRows>);
  else if (how.warps == 16)
    run(how.blocks == 1 ? step_linear_kernel<16, 4, 1, 0> : step_linear_kernel<16, 2, 2, 0>);
  else
    run(how.blocks == 2 ? step_linear_kernel<8, 4, 2, 0> : step_linear_kernel<8, 2, 4, 0>);
}

inline void run_mixer_state(const MixerStep& a) {
  auto* kernel = step_columns(a.rows) == 32 ? mixer_step_kernel<kMaxKeys, 32>
                                            : mixer_step_kernel<kMaxKeys, 128>;
  dim3 grid(blocks_for(a.value_dim, step_columns(a.rows)), a.rows);
  emulator::launch(grid, kStepThreads, [&] { kernel(a); });
}

// bfloat16 heads of the staged form.
inline void run_attention(const AttentionStep& a) {
  using T = __nv_bfloat16;
  bool many = a.heads > kFewHeads;
  auto* kernel = many ? attention_staged_kernel<T, false, 4, 3, 2, kManyHeads>
                      : attention_staged_kernel<T, false, 8, 2, 3, kFewHeads>;
  SharedOf shared(many ? attention_bytes<T, false, 4, 3>(a.value_heads)
                       : attention_bytes<T, false, 8, 2>(a.value_heads));
  emulator::launch(dim3(a.parts, a.batch * a.steps), a.heads * kHeadLanes, [&] { kernel(a); });
  if (a.parts > 1)
    emulator::launch(dim3(a.heads, a.batch * a.steps), kJoinThreads, [&] { attention_join_kernel(a); });
}

}  // namespace rodimus
