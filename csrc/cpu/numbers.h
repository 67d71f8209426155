// Arithmetic of the CPU kernels: bfloat16, exp, and blocks of numbers widened to float32.
//
// Loops over a block are written for the compiler to vectorise in the instruction set of the file
// that includes this; only C headers are used, so no inline function of a wider instruction set can
// replace its namesake elsewhere in the library.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace rodimus {
namespace RODIMUS_ISA {

struct BFloat16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return static_cast<float>(x); }
inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline void narrow(float x, float* out) { *out = x; }

// Round to nearest, ties to even; NaN stays NaN.
inline void narrow(float x, BFloat16* out) {
  uint32_t bits = to_bits(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

// e^x to 2 units in the last place; 0 below -87.3, finite above 88.
inline float exponential(float x) {
  float clamped = x < -87.3f ? -87.3f : (x > 88.0f ? 88.0f : x);
  // adding 1.5 * 2^23 rounds to an integer, which is then in the low bits
  float shifted = clamped * 1.44269504f + 12582912.0f;
  float n = shifted - 12582912.0f;
  float r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  float result = p * from_bits((to_bits(shifted) + 127u) << 23);
  return x < -87.3f ? 0.0f : result;
}

// Zero where e^-x is beyond the range of exponential(): the rest would matter after a large factor.
inline float sigmoid(float x) { return x < -88.0f ? 0.0f : 1.0f / (1.0f + exponential(-x)); }
inline float silu(float x) { return x < -88.0f ? x * 0.0f : x / (1.0f + exponential(-x)); }

inline int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

template <class T>
inline const T* row(const Rows& a, int64_t i) {
  return static_cast<const T*>(a.data) + i * a.stride;
}

// Elements [first, first + n) of a row as float32: in place, or widened into the buffer.
inline const float* read(const Rows& a, int64_t i, int64_t first, int64_t n, float* buffer) {
  if (a.type == Type::kFloat32) return row<float>(a, i) + first;
  const BFloat16* source = row<BFloat16>(a, i) + first;
  for (int64_t j = 0; j < n; ++j) buffer[j] = widen(source[j]);
  return buffer;
}

inline void write(const Rows& a, int64_t i, int64_t first, int64_t n, const float* values) {
  if (a.type == Type::kFloat32) {
    float* out = static_cast<float*>(a.data) + i * a.stride + first;
    for (int64_t j = 0; j < n; ++j) out[j] = values[j];
  } else {
    BFloat16* out = static_cast<BFloat16*>(a.data) + i * a.stride + first;
    for (int64_t j = 0; j < n; ++j) narrow(values[j], out + j);
  }
}

inline float sum_of_squares(const float* x, int64_t n) {
  // independent partial sums, so that the loop vectorises in a fixed order
  float partial[16] = {};
  int64_t j = 0;
  for (; j + 16 <= n; j += 16)
    for (int64_t l = 0; l < 16; ++l) partial[l] += x[j + l] * x[j + l];
  float sum = 0.0f;
  for (; j < n; ++j) sum += x[j] * x[j];
  for (int64_t l = 0; l < 16; ++l) sum += partial[l];
  return sum;
}

}  // namespace RODIMUS_ISA
}  // namespace rodimus
