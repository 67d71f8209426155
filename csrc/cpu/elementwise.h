// Convolution of one token, the norms of a block, rotary embedding, gates and sums.
#pragma once

#include "numbers.h"

namespace rodimus {
namespace RODIMUS_ISA {

// WIDTH taps, or any number of them if WIDTH is 0.
template <class T, int WIDTH>
inline void conv_block(const ConvStep& a, int64_t b, int64_t first, int64_t n) {
  float y[kBlock], bias_buffer[kBlock];
  const int64_t width = WIDTH ? WIDTH : a.width;
  const T* __restrict__ x = row<T>(a.x, b) + first;
  const T* __restrict__ weight = row<T>(a.weight, first);
  const int64_t stride = a.weight.stride;
  T* __restrict__ state = static_cast<T*>(a.state) + (b * a.channels + first) * width;
  for (int64_t j = 0; j < n; ++j) {
    float sum = 0.0f;
    for (int64_t w = 0; w < width; ++w) {
      T tap = w + 1 < width ? state[j * width + w + 1] : x[j];
      state[j * width + w] = tap;
      sum += widen(tap) * widen(weight[j * stride + w]);
    }
    y[j] = sum;
  }
  if (a.bias) {
    const float* bias = read(a.bias, 0, first, n, bias_buffer);
    for (int64_t j = 0; j < n; ++j) y[j] += bias[j];
  }
  for (int64_t j = 0; j < n; ++j) y[j] = silu(y[j]);
  write(a.y, b, first, n, y);
}

inline void conv_step(const ConvStep& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    int64_t b = task / blocks(a.channels), first = task % blocks(a.channels) * kBlock;
    int64_t n = at_most(a.channels - first, kBlock);
    bool is_float = a.x.type == Type::kFloat32;
    if (a.width == 4)
      is_float ? conv_block<float, 4>(a, b, first, n) : conv_block<BFloat16, 4>(a, b, first, n);
    else
      is_float ? conv_block<float, 0>(a, b, first, n) : conv_block<BFloat16, 0>(a, b, first, n);
  }
}

// Tokens [start, stop) of a sequence. The inputs of the last taps are kept widened, in one row per
// token that is reused in turn, so x is read once.
template <class T>
inline void conv_run(const Conv& a, int64_t b, int64_t start, int64_t stop, int64_t first, int64_t n) {
  float weight[kMaxTaps][kBlock], inputs[kMaxTaps][kBlock], y[kBlock], bias_buffer[kBlock];
  const int64_t width = a.width;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t w = 0; w < width; ++w) weight[w][j] = widen(row<T>(a.weight, first + j)[w]);
  const float* bias = a.bias ? read(a.bias, 0, first, n, bias_buffer) : nullptr;
  const int64_t* documents = a.documents ? a.documents + b * a.length : nullptr;
  const T* sequence = static_cast<const T*>(a.x.data) + b * a.sequence_stride + first;
  const T* state = static_cast<const T*>(a.state);
  if (state) state += (b * a.channels + first) * width;

  for (int64_t t = start - width + 1; t < stop; ++t) {
    float* __restrict__ input = inputs[(t + width) % width];
    if (t >= 0)
      for (int64_t j = 0; j < n; ++j) input[j] = widen(sequence[t * a.x.stride + j]);
    else
      for (int64_t j = 0; j < n; ++j) input[j] = state ? widen(state[j * width + width + t]) : 0.0f;
    if (t < start) continue;

    for (int64_t j = 0; j < n; ++j) y[j] = 0.0f;
    for (int64_t w = 0; w < width; ++w) {
      int64_t from = t - (width - 1 - w);
      if (documents && (from < 0 || documents[from] != documents[t])) continue;
      const float* tap = inputs[(from + width) % width];
      for (int64_t j = 0; j < n; ++j) y[j] += tap[j] * weight[w][j];
    }
    if (bias)
      for (int64_t j = 0; j < n; ++j) y[j] += bias[j];
    for (int64_t j = 0; j < n; ++j) y[j] = silu(y[j]);
    write(a.y, b * a.length + t, first, n, y);
  }
}

inline void conv(const Conv& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    int64_t first = task % blocks(a.channels) * kBlock, run = task / blocks(a.channels);
    int64_t b = run / conv_runs(a.length), start = run % conv_runs(a.length) * kConvTokens;
    int64_t stop = at_most(start + kConvTokens, a.length), n = at_most(a.channels - first, kBlock);
    a.x.type == Type::kFloat32 ? conv_run<float>(a, b, start, stop, first, n)
                               : conv_run<BFloat16>(a, b, start, stop, first, n);
  }
}

// Input of the norm for one block: x, x + residual, or the gated sum. A sum in bfloat16 is rounded
// before it is used further, as in the models.
inline void norm_input(const Norm& a, int64_t i, int64_t first, int64_t n, float* out) {
  float buffer[kBlock];
  const float* x = read(a.x, i, first, n, out);
  if (x != out) memcpy(out, x, n * sizeof(float));
  if (a.residual) {
    const float* residual = read(a.residual, i, first, n, buffer);
    if (a.residual_weight) {
      float weight_buffer[kBlock];
      const float* weight = read(a.residual_weight, 0, first, n, weight_buffer);
      for (int64_t j = 0; j < n; ++j) out[j] += residual[j] * weight[j];
    } else {
      for (int64_t j = 0; j < n; ++j) out[j] += residual[j];
    }
    Type type = a.sum ? a.sum.type : a.x.type;
    if (type == Type::kBFloat16)
      for (int64_t j = 0; j < n; ++j) {
        BFloat16 rounded;
        narrow(out[j], &rounded);
        out[j] = widen(rounded);
      }
  }
  if (a.gate) {
    const float* gate = read(a.gate, i, first, n, buffer);
    for (int64_t j = 0; j < n; ++j) out[j] *= silu(gate[j]);
  }
}

inline void norm(const Norm& a, int64_t begin, int64_t end) {
  float input[kBlock], weight_buffer[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    float squares = 0.0f;
    for (int64_t first = 0; first < a.dim; first += kBlock) {
      int64_t n = at_most(a.dim - first, kBlock);
      norm_input(a, i, first, n, input);
      if (a.sum) write(a.sum, i, first, n, input);
      squares += sum_of_squares(input, n);
    }
    float factor = 1.0f / sqrtf(squares / static_cast<float>(a.dim) + a.eps);
    // the input is computed a second time, which is cheaper than keeping a row of any length
    for (int64_t first = 0; first < a.dim; first += kBlock) {
      int64_t n = at_most(a.dim - first, kBlock);
      norm_input(a, i, first, n, input);
      const float* weight = read(a.weight, 0, first, n, weight_buffer);
      for (int64_t j = 0; j < n; ++j) input[j] *= factor * weight[j];
      write(a.y, i, first, n, input);
    }
  }
}

inline void rope(const Rope& a, int64_t begin, int64_t end) {
  float cos_buffer[kBlock], sin_buffer[kBlock], low[kBlock], high[kBlock];
  for (int64_t b = begin; b < end; ++b)
    for (int64_t first = 0; first < a.half; first += kBlock) {
      int64_t n = at_most(a.half - first, kBlock);
      const float* cos = read(a.cos, b, first, n, cos_buffer);
      const float* sin = read(a.sin, b, first, n, sin_buffer);
      for (int64_t h = 0; h < a.heads; ++h) {
        int64_t at = h * a.dim + first;
        const float* x = read(a.x, b, at, n, low);
        const float* y = read(a.x, b, at + a.half, n, high);
        float rotated[kBlock], turned[kBlock];
        for (int64_t j = 0; j < n; ++j) {
          rotated[j] = x[j] * cos[j] - y[j] * sin[j];
          turned[j] = x[j] * sin[j] + y[j] * cos[j];
        }
        write(a.x, b, at, n, rotated);
        write(a.x, b, at + a.half, n, turned);
      }
    }
}

template <class Function>
inline void pairwise(const Pairwise& a, int64_t begin, int64_t end, Function function) {
  float first_buffer[kBlock], second_buffer[kBlock], y[kBlock];
  for (int64_t task = begin; task < end; ++task) {
    int64_t i = task / blocks(a.dim), first = task % blocks(a.dim) * kBlock;
    int64_t n = at_most(a.dim - first, kBlock);
    const float* left = read(a.a, i, first, n, first_buffer);
    const float* right = read(a.b, i, first, n, second_buffer);
    for (int64_t j = 0; j < n; ++j) y[j] = function(left[j], right[j]);
    write(a.y, i, first, n, y);
  }
}

inline void add(const Pairwise& a, int64_t begin, int64_t end) {
  pairwise(a, begin, end, [](float x, float y) { return x + y; });
}

inline void gate(const Pairwise& a, int64_t begin, int64_t end) {
  pairwise(a, begin, end, [](float x, float y) { return x * silu(y); });
}

}  // namespace RODIMUS_ISA
}  // namespace rodimus
