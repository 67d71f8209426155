// Launches from torch's operators: device, stream, and the report of a launch that failed.
//
// A torch built for the CPU lacks one function used here. It is weak, so the library loads there
// too, and its registration can be checked on a machine without a GPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"
#include "kernels.h"

#pragma weak aoti_torch_get_current_cuda_stream

namespace rodimus {

// Call `run` with the current stream of the tensors' device.
template <class Run>
void on_stream(const Tensor& like, const Run& run) {
  torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  run(static_cast<cudaStream_t>(stream));
  // torch has a macro for this, but not in every release the library is built with
  cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "a kernel was not launched: ", cudaGetErrorString(error));
}

template <class Arguments>
void launch(void (*kernel)(const Arguments&, cudaStream_t), const Arguments& a, const Tensor& like) {
  on_stream(like, [&](cudaStream_t stream) { kernel(a, stream); });
}

inline void check_keys(int64_t keys) {
  STD_TORCH_CHECK(keys <= kMaxKeys, "K must be at most ", kMaxKeys, ", got ", keys);
}

}  // namespace rodimus
