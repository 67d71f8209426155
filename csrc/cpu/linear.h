// y = x weight^T for a few rows of x, at the speed at which the weights can be read.
//
// Weights are read in order, each once, a few rows side by side: enough sums in flight to hide the
// latency of the additions, and few enough streams for the processor's prefetchers. Those stop at a
// page's end, so the first two lines of the next rows are asked for ahead, one at a time; asking for
// every line was measured to be slower. One dot product always adds in the same order, whatever the
// number of rows, so a row's result does not depend on its neighbours.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "numbers.h"

namespace rodimus {
namespace RODIMUS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
// 32 registers hold the sums of four rows of x.
constexpr bool kWideGroups = true;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr bool kWideGroups = false;
#else
constexpr int kVectorBytes = 16;
constexpr bool kWideGroups = false;
#endif
// Rows of weights read side by side, for one row of x and for more: as many as the sums leave room.
constexpr int kRowsForOne = kWideGroups ? 8 : 4;
constexpr int kRowsForMore = 4;
constexpr int kLanes = kVectorBytes / 4;

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

// Halves are added to each other until one number is left, the same way on every instruction set.
inline float horizontal_sum(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  float lanes[kLanes];
  memcpy(lanes, &x, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
#endif
}

// In every second step of a dot product over R rows: ask for a line of R rows that come next.
template <int R, class T>
inline void prefetch_ahead(const T* next, int64_t stride, int64_t step) {
  if (step % 2 == 0 && step < 4 * R)
    __builtin_prefetch(reinterpret_cast<const char*>(next + step / 2 % R * stride) +
                       64 * (step / 2 / R));
}

// Dot products of R rows of float32 weights, `stride` apart, with M rows of x: out[r][m]. Rows at
// `next`, as far apart, will be asked for after these.
template <int R, int M>
inline void dots(const float* weight, const float* next, int64_t stride, const float* const* x, int64_t size,
                 float (*out)[M]) {
  Vector sum[R][M] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    prefetch_ahead<R>(next, stride, i / kLanes);
    Vector w[R];
    for (int r = 0; r < R; ++r) w[r] = load(weight + r * stride + i);
    for (int m = 0; m < M; ++m) {
      Vector x_part = load(x[m] + i);
      for (int r = 0; r < R; ++r) sum[r][m] += w[r] * x_part;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float tail = 0.0f;
      for (int64_t j = i; j < size; ++j) tail += weight[r * stride + j] * x[m][j];
      out[r][m] = horizontal_sum(sum[r][m]) + tail;
    }
}

// Elements of bfloat16 weights in one vector.
constexpr int kPair = 2 * kLanes;

#if defined(__AVX512BF16__)

inline __m512bh load_pairs(const BFloat16* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}

template <int R, int M>
inline void dots(const BFloat16* weight, const BFloat16* next, int64_t stride, const BFloat16* const* x, int64_t size,
                 float (*out)[M]) {
  __m512 sum[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sum[r][m] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + kPair <= size; i += kPair) {
    prefetch_ahead<R>(next, stride, i / kPair);
    __m512bh w[R];
    for (int r = 0; r < R; ++r) w[r] = load_pairs(weight + r * stride + i);
    for (int m = 0; m < M; ++m) {
      __m512bh x_part = load_pairs(x[m] + i);
      for (int r = 0; r < R; ++r) sum[r][m] = _mm512_dpbf16_ps(sum[r][m], w[r], x_part);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float tail = 0.0f;
      for (int64_t j = i; j < size; ++j) tail += widen(weight[r * stride + j]) * widen(x[m][j]);
      out[r][m] = horizontal_sum(reinterpret_cast<Vector>(sum[r][m])) + tail;
    }
}

#else

// x is float32 here, each run of kPair elements as its even ones, then its odd ones: a 32-bit word
// of weights holds an even element in its low half and an odd one in its high half.
template <int R, int M>
inline void dots(const BFloat16* weight, const BFloat16* next, int64_t stride, const float* const* x, int64_t size,
                 float (*out)[M]) {
  Vector even[R][M] = {}, odd[R][M] = {};
  int64_t i = 0;
  for (; i + kPair <= size; i += kPair) {
    prefetch_ahead<R>(next, stride, i / kPair);
    for (int r = 0; r < R; ++r) {
      Bits w = load_bits(weight + r * stride + i);
      Vector w_even = reinterpret_cast<Vector>(w << 16);
      Vector w_odd = reinterpret_cast<Vector>(w & 0xffff0000u);
      for (int m = 0; m < M; ++m) {
        even[r][m] += w_even * load(x[m] + i);
        odd[r][m] += w_odd * load(x[m] + i + kLanes);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      float tail = 0.0f;
      for (int64_t j = i; j < size; ++j) tail += widen(weight[r * stride + j]) * x[m][j];
      out[r][m] = horizontal_sum(even[r][m] + odd[r][m]) + tail;
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

// out[r][m] for R rows of weights and any number of rows of x, in groups whose sums fit the
// registers; the weights of the second and later groups come from the cache.
template <class T, int R>
inline void products(const T* weight, const T* next, int64_t stride, const typename Operand<T>::type* const* x,
                     int64_t rows, int64_t size, float (*out)[kMaxRows]) {
  int64_t m = 0;
  [[maybe_unused]] float part4[R][4];
  float part2[R][2], part1[R][1];
  auto keep = [&](auto& part, int count) {
    for (int r = 0; r < R; ++r)
      for (int g = 0; g < count; ++g) out[r][m + g] = part[r][g];
    m += count;
  };
  if constexpr (kWideGroups && R <= kRowsForMore)
    while (m + 4 <= rows) dots<R, 4>(weight, next, stride, x + m, size, part4), keep(part4, 4);
  while (m + 2 <= rows) dots<R, 2>(weight, next, stride, x + m, size, part2), keep(part2, 2);
  while (m < rows) dots<R, 1>(weight, next, stride, x + m, size, part1), keep(part1, 1);
}

inline void linear_prepare(const Linear& a) {
  if (a.x.type == Type::kBFloat16)
    for (int64_t m = 0; m < a.rows; ++m)
      Operand<BFloat16>::make(row<BFloat16>(a.x, m), a.inputs, a.scratch + m * a.inputs);
}

template <class T, int R>
inline void linear_rows(const Linear& a, int64_t begin, int64_t end) {
  const typename Operand<T>::type* x[kMaxRows];
  for (int64_t m = 0; m < a.rows; ++m)
    x[m] = Operand<T>::made(row<T>(a.x, m), a.scratch + m * a.inputs);
  float sums[R][kMaxRows], bias_buffer[1];
  for (int64_t n = begin; n < end; n += R) {
    int64_t count = at_most(end - n, R);
    const T* weight = row<T>(a.weight, n);
    const T* next = n + 2 * R <= end ? weight + R * a.weight.stride : weight;
    if (count == R)
      products<T, R>(weight, next, a.weight.stride, x, a.rows, a.inputs, sums);
    else
      for (int64_t r = 0; r < count; ++r)
        products<T, 1>(row<T>(a.weight, n + r), next, 0, x, a.rows, a.inputs, sums + r);
    for (int64_t r = 0; r < count; ++r) {
      float bias = a.bias ? *read(a.bias, 0, n + r, 1, bias_buffer) : 0.0f;
      for (int64_t m = 0; m < a.rows; ++m) {
        float y = sums[r][m] + bias;
        write(a.y, m, n + r, 1, &y);
      }
    }
  }
}

template <class T>
inline void linear_of(const Linear& a, int64_t begin, int64_t end) {
  if (a.rows == 1)
    linear_rows<T, kRowsForOne>(a, begin, end);
  else
    linear_rows<T, kRowsForMore>(a, begin, end);
}

inline void linear(const Linear& a, int64_t begin, int64_t end) {
  if (a.weight.type == Type::kFloat32)
    linear_of<float>(a, begin, end);
  else
    linear_of<BFloat16>(a, begin, end);
}

// out[j] = weight[first + j] . x for n rows of a narrow matrix and one row of x.
template <class T>
inline void narrow_products_of(const Rows& weight, const T* x, int64_t size, int64_t first,
                               int64_t n, float* out) {
  float buffer[kBlock], sum[1][1];
  for (int64_t j = 0; j < n; ++j) out[j] = 0.0f;
  for (int64_t i = 0; i < size; i += kBlock) {
    int64_t part = at_most(size - i, kBlock);
    const typename Operand<T>::type* ready = Operand<T>::make(x + i, part, buffer);
    for (int64_t j = 0; j < n; ++j) {
      const T* start = row<T>(weight, first + j) + i;
      dots<1, 1>(start, start, 0, &ready, part, sum);
      out[j] += sum[0][0];
    }
  }
}

inline void narrow_products(const Rows& weight, const Rows& x, int64_t x_row, int64_t size,
                            int64_t first, int64_t n, float* out) {
  if (weight.type == Type::kFloat32)
    narrow_products_of(weight, row<float>(x, x_row), size, first, n, out);
  else
    narrow_products_of(weight, row<BFloat16>(x, x_row), size, first, n, out);
}

}  // namespace RODIMUS_ISA
}  // namespace rodimus
