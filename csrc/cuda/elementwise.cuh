// Convolution of one token, and the norms of a block.
#pragma once

#include "common.cuh"

namespace rodimus {

constexpr int kRowThreads = 256;

template <class T>
struct alignas(4 * sizeof(T)) Group {
  T value[4];
};

template <class T>
__device__ inline bool starts_group(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % sizeof(Group<T>) == 0;
}

// One channel of the convolution, loaded before the newest input is known; then the taps shift.
template <class T>
struct ConvTaps {
  Group<T> taps, weights;
  float bias;
  // four taps, as the models have: all in one access
  bool together;

  __device__ static T* state_of(const ConvStep& a, int64_t b, int64_t channel) {
    return static_cast<T*>(a.state) + (b * a.channels + channel) * a.width;
  }
  __device__ static const T* weight_of(const ConvStep& a, int64_t channel) {
    return static_cast<const T*>(a.weight.data) + channel * a.weight.stride;
  }
  __device__ void load(const ConvStep& a, int64_t b, int64_t channel) {
    const T *state = state_of(a, b, channel), *weight = weight_of(a, channel);
    bias = a.bias ? element(a.bias, 0, channel) : 0.0f;
    together = a.width == 4 && starts_group(state) && starts_group(weight);
    if (!together) return;
    taps = *reinterpret_cast<const Group<T>*>(state);
    weights = *reinterpret_cast<const Group<T>*>(weight);
  }
  __device__ void finish(const ConvStep& a, int64_t b, int64_t channel, T newest) {
    T* state = state_of(a, b, channel);
    float sum = bias;
    if (together) {
      taps.value[0] = taps.value[1], taps.value[1] = taps.value[2], taps.value[2] = taps.value[3];
      taps.value[3] = newest;
      *reinterpret_cast<Group<T>*>(state) = taps;
#pragma unroll
      for (int w = 0; w < 4; ++w) sum += widen(taps.value[w]) * widen(weights.value[w]);
    } else {
      const T* weight = weight_of(a, channel);
      for (int64_t w = 0; w < a.width; ++w) {
        T tap = w + 1 < a.width ? state[w + 1] : newest;
        state[w] = tap;
        sum += widen(tap) * widen(weight[w]);
      }
    }
    set_element(a.y, b, channel, silu(sum));
  }
};

// Grid: (ceil(D / 256), B).
template <class T>
__global__ void __launch_bounds__(kRowThreads) conv_step_kernel(ConvStep a) {
  int64_t b = blockIdx.y, channel = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  take_turn();
  if (channel >= a.channels) return;
  ConvTaps<T> taps;
  taps.load(a, b, channel);
  taps.finish(a, b, channel, static_cast<const T*>(a.x.data)[b * a.x.stride + channel]);
}

// Input of the norm for one element: x, x + residual, or the gated sum. A sum in bfloat16 is
// rounded before it is used further, as in the models.
__device__ inline float norm_input(const Norm& a, int64_t i, int64_t j) {
  float x = element(a.x, i, j);
  if (a.residual) {
    float weight = a.residual_weight ? element(a.residual_weight, 0, j) : 1.0f;
    x += element(a.residual, i, j) * weight;
    if ((a.sum ? a.sum.type : a.x.type) == Type::kBFloat16) x = widen(__float2bfloat16(x));
  }
  return a.gate ? x * silu(element(a.gate, i, j)) : x;
}

// Grid: rows.
__global__ void __launch_bounds__(kRowThreads) norm_kernel(Norm a) {
  __shared__ float warps[kRowThreads / kWarp];
  int64_t i = blockIdx.x;
  float squares = 0.0f;
  take_turn();
  for (int64_t j = threadIdx.x; j < a.dim; j += kRowThreads) {
    float x = norm_input(a, i, j);
    if (a.sum) set_element(a.sum, i, j, x);
    squares += x * x;
  }
  squares = block_sum(squares, warps);
  float factor = 1.0f / sqrtf(squares / static_cast<float>(a.dim) + a.eps);
  for (int64_t j = threadIdx.x; j < a.dim; j += kRowThreads)
    set_element(a.y, i, j, norm_input(a, i, j) * factor * element(a.weight, 0, j));
}

}  // namespace rodimus
