// Launches from torch's operators: device, stream, and the report of a launch that failed.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"
#include "kernels.h"

namespace rodimus {

// torch's function for the current stream of a device. Looked up when first needed, because it is
// in torch's library for GPUs, whose symbols other libraries do not see when Python has loaded it.
// So this library also loads without it, and its registration can be checked with a torch for CPUs.
inline auto current_stream_function() {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* function = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    STD_TORCH_CHECK(function != nullptr, "the CUDA operators need a torch built for CUDA: ",
                    library ? "libtorch_cuda.so lacks aoti_torch_get_current_cuda_stream"
                            : "libtorch_cuda.so is not loaded");
    return reinterpret_cast<Function>(function);
  }();
  return found;
}

// The error that keeps the linked-in CUDA runtime from running here, such as too old a driver.
inline cudaError_t runtime_problem() {
  int device = 0;
  return cudaGetDevice(&device);
}

// Call `run` with the current stream of the tensors' device.
template <class Run>
void on_stream(const Tensor& like, const Run& run) {
  auto current_stream = current_stream_function();
  torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream(like.get_device_index(), &stream));
  // checked first: with such an error, queries about the device that `run` makes would fail as well
  cudaError_t error = runtime_problem();
  if (error == cudaSuccess) {
    run(static_cast<cudaStream_t>(stream));
    // torch has a macro for this, but not in every release the library is built with
    error = cudaGetLastError();
  }
  STD_TORCH_CHECK(error == cudaSuccess, "a kernel was not launched: ", cudaGetErrorString(error));
}

// Does nothing if `like`, a tensor that decides the grid, such as the result, is empty.
template <class Arguments>
void launch(void (*kernel)(const Arguments&, cudaStream_t), const Arguments& a, const Tensor& like) {
  if (like.numel() == 0) return;
  on_stream(like, [&](cudaStream_t stream) { kernel(a, stream); });
}

// Check the number of rows, which are along the second axis of a grid.
inline void check_rows(const char* what, int64_t rows) {
  constexpr int64_t kMostRows = 65535;
  STD_TORCH_CHECK(rows <= kMostRows, what, " must be at most ", kMostRows, " on CUDA, got ", rows);
}

inline void check_keys(int64_t keys) {
  STD_TORCH_CHECK(keys <= kMaxKeys, "K must be at most ", kMaxKeys, ", got ", keys);
}

}  // namespace rodimus
