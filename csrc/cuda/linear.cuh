// y = x weight^T + bias for up to eight rows of x that are float32 or do not start on 16 bytes: one
// warp per output, weights are read once, x comes from the cache. step_linear.cuh has the rest.
#pragma once

#include "common.cuh"

namespace rodimus {

constexpr int kLinearWarps = 4;

// Grid: ceil(outputs / 4). M: rows of x, rounded up; a row beyond the last repeats it and is not
// written. ALIGNED: rows start on 16 bytes and hold whole pieces.
template <class T, int M, bool ALIGNED>
__global__ void __launch_bounds__(kLinearWarps* kWarp, 4) linear_kernel(Linear a) {
  constexpr int kSize = Piece<T>::kSize;
  int lane = threadIdx.x % kWarp;
  int64_t n = static_cast<int64_t>(blockIdx.x) * kLinearWarps + threadIdx.x / kWarp;
  take_turn();
  if (n >= a.outputs) return;
  const T* weight = static_cast<const T*>(a.weight.data) + n * a.weight.stride;
  const T* x[M];
#pragma unroll
  for (int m = 0; m < M; ++m)
    x[m] = static_cast<const T*>(a.x.data) + (m < a.rows ? m : a.rows - 1) * a.x.stride;
  float sum[M] = {};
  int64_t i = lane * kSize, step = kWarp * kSize;
  Piece<T> w = {};
  if (ALIGNED && i < a.inputs) w = *reinterpret_cast<const Piece<T>*>(weight + i);
  if (ALIGNED) {
    while (i < a.inputs) {
      Piece<T> now = w;
      if (i + step < a.inputs) w = *reinterpret_cast<const Piece<T>*>(weight + i + step);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        Piece<T> part = *reinterpret_cast<const Piece<T>*>(x[m] + i);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum[m] += widen(now.value[e]) * widen(part.value[e]);
      }
      i += step;
    }
  } else {
    for (i = lane; i < a.inputs; i += kWarp)
#pragma unroll
      for (int m = 0; m < M; ++m) sum[m] += widen(weight[i]) * widen(x[m][i]);
  }
  float bias = a.bias ? element(a.bias, 0, n) : 0.0f;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float total = warp_sum(sum[m]);
    if (lane == 0 && m < a.rows)
      narrow(total + bias, static_cast<T*>(a.y.data) + m * a.y.stride + n);
  }
}

}  // namespace rodimus
