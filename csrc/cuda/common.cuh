// What the CUDA kernels share: element types, reductions over a warp and a block.
// No torch here, so nvcc alone compiles and inspects the kernels.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

#include "../arguments.h"

namespace rodimus {

constexpr int kWarp = 32;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16(x); }

// One element of an argument whose type is known at run time: for what is read once a block.
__device__ inline float element(const Rows& a, int64_t row, int64_t column) {
  int64_t i = row * a.stride + column;
  if (a.type == Type::kFloat32) return static_cast<const float*>(a.data)[i];
  return __bfloat162float(static_cast<const __nv_bfloat16*>(a.data)[i]);
}

__device__ inline void set_element(const Rows& a, int64_t row, int64_t column, float x) {
  int64_t i = row * a.stride + column;
  if (a.type == Type::kFloat32)
    static_cast<float*>(a.data)[i] = x;
  else
    static_cast<__nv_bfloat16*>(a.data)[i] = __float2bfloat16(x);
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ inline float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
// ln softplus(x), finite where softplus underflows.
__device__ inline float log_softplus(float x) {
  return x < -20.0f ? x - 0.5f * expf(x) : logf(softplus(x));
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Sum over a block of whole warps, the same value in every thread; `shared` holds a float a warp.
__device__ inline float block_sum(float x, float* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) sum += shared[w];
  return sum;
}

}  // namespace rodimus
