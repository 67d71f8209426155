// DDTS for one token: the state update and readout, and the mixer around it.
#pragma once

#include "linear.h"
#include "numbers.h"

namespace rodimus {
namespace RODIMUS_ISA {

// state[i, j] = decay[i] * state[i, j] + k[i] * v[j];  o[j] = sum_i q[i] * state[i, j]
// for n <= kBlock columns of a [keys, stride] state. Four rows at a time: o is read and written once
// for them.
inline void recur(const float* __restrict__ decay, const float* __restrict__ k,
                  const float* __restrict__ q, const float* __restrict__ v,
                  float* __restrict__ state, int64_t keys, int64_t stride, int64_t n,
                  float* __restrict__ o) {
  for (int64_t j = 0; j < n; ++j) o[j] = 0.0f;
  int64_t i = 0;
  for (; i + 4 <= keys; i += 4) {
    float* __restrict__ s0 = state + i * stride;
    float* __restrict__ s1 = s0 + stride;
    float* __restrict__ s2 = s1 + stride;
    float* __restrict__ s3 = s2 + stride;
    if (i + 8 < keys)
      for (int64_t r = 8; r < 12; ++r)
        for (int64_t j = 0; j < n; j += 16) __builtin_prefetch(s0 + r * stride + j, 1);
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      float a = decay[i] * s0[j] + k[i] * v[j];
      float b = decay[i + 1] * s1[j] + k[i + 1] * v[j];
      float c = decay[i + 2] * s2[j] + k[i + 2] * v[j];
      float d = decay[i + 3] * s3[j] + k[i + 3] * v[j];
      s0[j] = a, s1[j] = b, s2[j] = c, s3[j] = d;
      o[j] += (q[i] * a + q[i + 1] * b) + (q[i + 2] * c + q[i + 3] * d);
    }
  }
  for (; i < keys; ++i) {
    float* __restrict__ s = state + i * stride;
    for (int64_t j = 0; j < n; ++j) {
      s[j] = decay[i] * s[j] + k[i] * v[j];
      o[j] += q[i] * s[j];
    }
  }
}

inline void ddts_step(const DdtsStep& a, int64_t begin, int64_t end) {
  // keys are taken kBlock at a time, so any number of them fits these buffers
  float decay[kBlock], k[kBlock], q[kBlock], v[kBlock], o[kBlock], part[kBlock];
  for (int64_t task = begin; task < end; ++task) {
    int64_t n = task / blocks(a.value_dim), first = task % blocks(a.value_dim) * kBlock;
    int64_t columns = at_most(a.value_dim - first, kBlock);
    const float* v_block = read(a.v, n, first, columns, v);
    for (int64_t j = 0; j < columns; ++j) o[j] = 0.0f;
    for (int64_t i = 0; i < a.key_dim; i += kBlock) {
      int64_t keys = at_most(a.key_dim - i, kBlock);
      const float* log_decay = read(a.log_decay, n, i, keys, decay);
      for (int64_t l = 0; l < keys; ++l) decay[l] = exponential(log_decay[l]);
      const float* q_block = read(a.q, n, i, keys, q);
      for (int64_t l = 0; l < keys; ++l) q[l] = a.scale * q_block[l];
      float* state = a.state + (n * a.key_dim + i) * a.value_dim + first;
      recur(decay, read(a.k, n, i, keys, k), q, v_block, state, keys, a.value_dim, columns, part);
      for (int64_t j = 0; j < columns; ++j) o[j] += part[j];
    }
    write(a.o, n, first, columns, o);
  }
}

// Where the scratch of row b keeps its parts.
struct MixerScratch {
  float *q, *k, *decay, *gated, *squares;

  MixerScratch(const MixerStep& a, int64_t b) {
    q = a.scratch + b * (3 * a.key_dim + a.value_dim + blocks(a.value_dim));
    k = q + a.key_dim;
    decay = k + a.key_dim;
    gated = decay + a.key_dim;
    squares = gated + a.value_dim;
  }
};

// ln(1 + e^x) and its logarithm, which stays finite where the first underflows.
inline float softplus(float x) { return (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x))); }
inline float log_softplus(float x) { return x < -20.0f ? x - 0.5f * expf(x) : logf(softplus(x)); }

inline void mixer_gates(const MixerStep& a, int64_t begin, int64_t end) {
  float buffer[kBlock];
  for (int64_t b = begin; b < end; ++b) {
    MixerScratch s(a, b);
    float squares = 0.0f;
    for (int64_t i = 0; i < a.key_dim; i += kBlock) {
      int64_t keys = at_most(a.key_dim - i, kBlock);
      const float* q = read(a.q, b, i, keys, buffer);
      for (int64_t l = 0; l < keys; ++l) s.q[i + l] = a.scale * q[l];
      const float* k = read(a.k, b, i, keys, buffer);
      for (int64_t l = 0; l < keys; ++l) s.k[i + l] = k[l];
      squares += sum_of_squares(k, keys);
    }
    float norm = sqrtf(squares);
    norm = norm > a.key_eps ? norm : a.key_eps;
    for (int64_t i = 0; i < a.key_dim; i += kBlock) {
      int64_t keys = at_most(a.key_dim - i, kBlock);
      float temper_buffer[kBlock];
      const float* select = read(a.select, b, i, keys, buffer);
      const float* temper = read(a.temper, b, i, keys, temper_buffer);
      for (int64_t l = 0; l < keys; ++l) {
        float tau = 1.0f / (1.0f + expf(-temper[l]));
        s.k[i + l] = s.k[i + l] / norm * expf(tau * log_softplus(select[l]));
        s.decay[i + l] = expf(-softplus(select[l]) * tau);
      }
    }
  }
}

inline void mixer_step(const MixerStep& a, int64_t begin, int64_t end) {
  float v[kBlock], o[kBlock], buffer[kBlock];
  for (int64_t task = begin; task < end; ++task) {
    int64_t b = task / blocks(a.value_dim), block = task % blocks(a.value_dim);
    int64_t first = block * kBlock, n = at_most(a.value_dim - first, kBlock);
    MixerScratch s(a, b);
    narrow_products(a.gate_weight, a.gate_scale, a.gate_hidden, b, a.gate_dim, first, n, v);
    const float* bias = read(a.gate_bias, 0, first, n, buffer);
    for (int64_t j = 0; j < n; ++j) v[j] = sigmoid(v[j] + bias[j]);
    const float* x = read(a.x, b, first, n, buffer);
    for (int64_t j = 0; j < n; ++j) v[j] *= x[j];

    float* state = a.state + b * a.key_dim * a.value_dim + first;
    recur(s.decay, s.k, s.q, v, state, a.key_dim, a.value_dim, n, o);

    const float* shifted = read(a.shifted, b, first, n, v);
    const float* residual_weight = read(a.residual_weight, 0, first, n, buffer);
    for (int64_t j = 0; j < n; ++j) o[j] += shifted[j] * residual_weight[j];
    const float* gate = read(a.gate, b, first, n, buffer);
    for (int64_t j = 0; j < n; ++j) s.gated[first + j] = o[j] * silu(gate[j]);
    s.squares[block] = sum_of_squares(s.gated + first, n);
  }
}

inline void mixer_norm(const MixerStep& a, int64_t begin, int64_t end) {
  float weight_buffer[kBlock], y[kBlock];
  for (int64_t b = begin; b < end; ++b) {
    MixerScratch s(a, b);
    float squares = 0.0f;
    for (int64_t block = 0; block < blocks(a.value_dim); ++block) squares += s.squares[block];
    float factor = 1.0f / sqrtf(squares / static_cast<float>(a.value_dim) + a.norm_eps);
    for (int64_t first = 0; first < a.value_dim; first += kBlock) {
      int64_t n = at_most(a.value_dim - first, kBlock);
      const float* weight = read(a.norm_weight, 0, first, n, weight_buffer);
      for (int64_t j = 0; j < n; ++j) y[j] = s.gated[first + j] * factor * weight[j];
      write(a.y, b, first, n, y);
    }
  }
}

}  // namespace RODIMUS_ISA
}  // namespace rodimus
