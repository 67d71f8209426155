// A window with 8-bit values: its rows, and how a head is quantised, the same on CPU and CUDA.
// Results are bitwise equal to those of rodimus_kernels.reference.quantize_values.
#pragma once

#include <stdint.h>
#include <string.h>

#include "arguments.h"

namespace rodimus {

// Type in which a ring stores a value: T, or a byte.
template <class T, bool INT8>
struct RingValue {
  using type = T;
};
template <class T>
struct RingValue<T, true> {
  using type = int8_t;
};

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// A row of the ring in bytes: keys, int8 values, bfloat16 scales from an even byte on, and padding
// to a multiple of 16.
struct Int8Row {
  int64_t values_at, scales_at, bytes;
};

// Functions are static, so that each instruction set of the CPU kernels has its own.

RODIMUS_EVERYWHERE static constexpr Int8Row int8_row(int64_t key_bytes, int64_t value_heads,
                                                     int64_t value_dim) {
  int64_t scales_at = (key_bytes + value_heads * value_dim + 1) / 2 * 2;
  return {key_bytes, scales_at, (scales_at + 2 * value_heads + 15) / 16 * 16};
}

// A magnitude as an integer, in the same order, with NaN above infinity above all numbers.
RODIMUS_EVERYWHERE static inline uint32_t magnitude(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffu;
}

RODIMUS_EVERYWHERE static inline float scale_value(uint16_t scale) {
  uint32_t bits = static_cast<uint32_t>(scale) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The scale of a head, in the bits of a bfloat16, from its largest magnitude: a 127th of it,
// rounded to nearest; 0 if below the smallest normal number, NaN if the magnitude is not finite.
RODIMUS_EVERYWHERE static inline uint16_t scale_of(uint32_t largest) {
  if (largest >= 0x7f800000u) return 0x7fc0u;
  float x;
  memcpy(&x, &largest, sizeof x);
  x *= 1.0f / 127.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (bits < 0x00800000u) return 0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// A value in steps of its scale, ties to even; 0 where there is no usable scale.
RODIMUS_EVERYWHERE static inline float step_of(float value, float scale) {
  // adding 1.5 * 2^23 rounds to an integer
  float shifted = value / scale + 12582912.0f;
  return scale > 0.0f ? shifted - 12582912.0f : 0.0f;
}

}  // namespace rodimus
