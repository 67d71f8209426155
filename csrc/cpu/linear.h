// y = x weight^T for a few rows of x, at the speed at which the weights can be read.
//
// Weights are streamed row by row, each row once: memory is then read in order, which is what the
// prefetchers want. One dot product always uses the same accumulators in the same order, whatever
// the number of rows, so a row's result does not depend on its neighbours.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "numbers.h"

namespace rodimus {
namespace RODIMUS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
// Rows of x that share a pass over a row of weights: accumulators must fit the registers.
constexpr int kGroup = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kGroup = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kGroup = 2;
#endif
constexpr int kLanes = kVectorBytes / 4;
// Weights are asked for this many bytes ahead; it crosses into the next row, which follows.
constexpr int kPrefetch = 2048;

typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));

inline Vector load(const float* p) {
  Vector x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline Bits load_bits(const void* p) {
  Bits x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline float horizontal_sum(Vector x) {
  float lanes[kLanes];
  memcpy(lanes, &x, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

// Dot products of one row of float32 weights with M rows of x.
template <int M>
inline void dots(const float* weight, const float* const* x, int64_t size, float* out) {
  Vector a[M] = {}, b[M] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    __builtin_prefetch(reinterpret_cast<const char*>(weight + i) + kPrefetch);
    Vector w0 = load(weight + i), w1 = load(weight + i + kLanes);
    for (int m = 0; m < M; ++m) {
      a[m] += w0 * load(x[m] + i);
      b[m] += w1 * load(x[m] + i + kLanes);
    }
  }
  for (int m = 0; m < M; ++m) {
    float tail = 0.0f;
    for (int64_t j = i; j < size; ++j) tail += weight[j] * x[m][j];
    out[m] = horizontal_sum(a[m] + b[m]) + tail;
  }
}

// Elements of bfloat16 weights in one vector.
constexpr int kPair = 2 * kLanes;

#if defined(__AVX512BF16__)

inline __m512bh load_pairs(const BFloat16* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}

template <int M>
inline void dots(const BFloat16* weight, const BFloat16* const* x, int64_t size, float* out) {
  __m512 a[M], b[M];
  for (int m = 0; m < M; ++m) a[m] = b[m] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 2 * kPair <= size; i += 2 * kPair) {
    __builtin_prefetch(reinterpret_cast<const char*>(weight + i) + kPrefetch);
    __builtin_prefetch(reinterpret_cast<const char*>(weight + i) + kPrefetch + 64);
    __m512bh w0 = load_pairs(weight + i), w1 = load_pairs(weight + i + kPair);
    for (int m = 0; m < M; ++m) {
      a[m] = _mm512_dpbf16_ps(a[m], w0, load_pairs(x[m] + i));
      b[m] = _mm512_dpbf16_ps(b[m], w1, load_pairs(x[m] + i + kPair));
    }
  }
  for (; i + kPair <= size; i += kPair) {
    __m512bh w = load_pairs(weight + i);
    for (int m = 0; m < M; ++m) a[m] = _mm512_dpbf16_ps(a[m], w, load_pairs(x[m] + i));
  }
  for (int m = 0; m < M; ++m) {
    float tail = 0.0f;
    for (int64_t j = i; j < size; ++j) tail += widen(weight[j]) * widen(x[m][j]);
    out[m] = horizontal_sum(reinterpret_cast<Vector>(a[m] + b[m])) + tail;
  }
}

#else

// x is float32 here, each run of kPair elements as its even ones, then its odd ones: a 32-bit word
// of weights holds an even element in its low half and an odd one in its high half.
template <int M>
inline void dots(const BFloat16* weight, const float* const* x, int64_t size, float* out) {
  Vector even[M] = {}, odd[M] = {}, even2[M] = {}, odd2[M] = {};
  int64_t i = 0;
  for (; i + 2 * kPair <= size; i += 2 * kPair) {
    __builtin_prefetch(reinterpret_cast<const char*>(weight + i) + kPrefetch);
    Bits w0 = load_bits(weight + i), w1 = load_bits(weight + i + kPair);
    Vector e0 = reinterpret_cast<Vector>(w0 << 16), e1 = reinterpret_cast<Vector>(w1 << 16);
    Vector o0 = reinterpret_cast<Vector>(w0 & 0xffff0000u);
    Vector o1 = reinterpret_cast<Vector>(w1 & 0xffff0000u);
    for (int m = 0; m < M; ++m) {
      even[m] += e0 * load(x[m] + i);
      odd[m] += o0 * load(x[m] + i + kLanes);
      even2[m] += e1 * load(x[m] + i + kPair);
      odd2[m] += o1 * load(x[m] + i + kPair + kLanes);
    }
  }
  for (; i + kPair <= size; i += kPair) {
    Bits w = load_bits(weight + i);
    for (int m = 0; m < M; ++m) {
      even[m] += reinterpret_cast<Vector>(w << 16) * load(x[m] + i);
      odd[m] += reinterpret_cast<Vector>(w & 0xffff0000u) * load(x[m] + i + kLanes);
    }
  }
  for (int m = 0; m < M; ++m) {
    float tail = 0.0f;
    for (int64_t j = i; j < size; ++j) tail += widen(weight[j]) * x[m][j];
    out[m] = horizontal_sum((even[m] + even2[m]) + (odd[m] + odd2[m])) + tail;
  }
}

#endif

// What a row of x must be turned into before the dot products: nothing where they take it as it
// stands, else float32 in their order, `size` floats.
template <class T>
struct Operand {
  using type = T;
  static const T* make(const T* x, int64_t, float*) { return x; }
  static const T* made(const T* x, const float*) { return x; }
};

#if !defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
  using type = float;
  static const float* make(const BFloat16* x, int64_t size, float* out) {
    int64_t whole = size / kPair * kPair;
    for (int64_t i = 0; i < whole; i += kPair)
      for (int64_t l = 0; l < kLanes; ++l) {
        out[i + l] = widen(x[i + 2 * l]);
        out[i + kLanes + l] = widen(x[i + 2 * l + 1]);
      }
    for (int64_t i = whole; i < size; ++i) out[i] = widen(x[i]);
    return out;
  }
  static const float* made(const BFloat16*, const float* out) { return out; }
};
#endif

// All rows of x against one row of weights.
template <class T>
inline void one_output(const T* weight, const typename Operand<T>::type* const* x, int64_t rows,
                       int64_t size, float* out) {
  int64_t m = 0;
  for (; m + kGroup <= rows; m += kGroup) dots<kGroup>(weight, x + m, size, out + m);
  for (; m < rows; ++m) dots<1>(weight, x + m, size, out + m);
}

inline void linear_prepare(const Linear& a) {
  if (a.x.type == Type::kBFloat16)
    for (int64_t m = 0; m < a.rows; ++m)
      Operand<BFloat16>::make(row<BFloat16>(a.x, m), a.inputs, a.scratch + m * a.inputs);
}

template <class T>
inline void linear_of(const Linear& a, int64_t begin, int64_t end) {
  const typename Operand<T>::type* x[kMaxRows];
  for (int64_t m = 0; m < a.rows; ++m)
    x[m] = Operand<T>::made(row<T>(a.x, m), a.scratch + m * a.inputs);
  float sums[kMaxRows], bias_buffer[1];
  for (int64_t n = begin; n < end; ++n) {
    one_output<T>(row<T>(a.weight, n), x, a.rows, a.inputs, sums);
    float bias = a.bias ? *read(a.bias, 0, n, 1, bias_buffer) : 0.0f;
    T* y = static_cast<T*>(a.y.data) + n;
    for (int64_t m = 0; m < a.rows; ++m) narrow(sums[m] + bias, y + m * a.y.stride);
  }
}

inline void linear(const Linear& a, int64_t begin, int64_t end) {
  if (a.weight.type == Type::kFloat32)
    linear_of<float>(a, begin, end);
  else
    linear_of<BFloat16>(a, begin, end);
}

// out[j] = weight[first + j] . x for n rows of a narrow matrix and one row of x.
template <class T>
inline void products_of(const Rows& weight, const T* x, int64_t size, int64_t first, int64_t n,
                        float* out) {
  float buffer[kBlock], sum;
  for (int64_t j = 0; j < n; ++j) out[j] = 0.0f;
  for (int64_t i = 0; i < size; i += kBlock) {
    int64_t part = at_most(size - i, kBlock);
    const typename Operand<T>::type* ready = Operand<T>::make(x + i, part, buffer);
    for (int64_t j = 0; j < n; ++j) {
      dots<1>(row<T>(weight, first + j) + i, &ready, part, &sum);
      out[j] += sum;
    }
  }
}

inline void products(const Rows& weight, const Rows& x, int64_t x_row, int64_t size, int64_t first,
                     int64_t n, float* out) {
  if (weight.type == Type::kFloat32)
    products_of(weight, row<float>(x, x_row), size, first, n, out);
  else
    products_of(weight, row<BFloat16>(x, x_row), size, first, n, out);
}

}  // namespace RODIMUS_ISA
}  // namespace rodimus
