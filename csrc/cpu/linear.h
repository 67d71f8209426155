// y = x weight^T for a few rows of x, at the speed at which the weights can be read.
//
// For one row of x, weights are read in order, because the processor's prefetchers follow a single
// stream per thread best. For more rows of x, a few rows of weights are read side by side, so that
// x is read less often. One dot product always adds in the same order, so a row's result does not
// depend on the other rows.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "numbers.h"

namespace rodimus {
namespace RODIMUS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
// 32 vector registers for the sums.
constexpr bool kManyRegisters = true;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr bool kManyRegisters = false;
#else
constexpr int kVectorBytes = 16;
constexpr bool kManyRegisters = false;
#endif
constexpr int kLanes = kVectorBytes / 4;
// Rows of x that rows of weights are multiplied with at once.
constexpr int kMostTogether = kManyRegisters ? 3 : 2;

typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));

inline Vector load(const float* p) {
  Vector x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Vector x) { memcpy(p, &x, sizeof x); }

inline Bits load_bits(const void* p) {
  Bits x;
  memcpy(&x, p, sizeof x);
  return x;
}

// The first n numbers at p, fewer than a vector has, followed by zeros.
template <class V, class T>
inline V load_first(const T* p, int64_t n) {
#if defined(__AVX512F__)
  uint64_t mask = (uint64_t{1} << n) - 1;
  if constexpr (sizeof(T) == 2)
    return reinterpret_cast<V>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), p));
  else
    return reinterpret_cast<V>(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), p));
#else
  V x = {};
  memcpy(&x, p, n * sizeof(T));
  return x;
#endif
}

// Halves are added to each other until one number is left, alike with every instruction set.
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

// Lane l: the horizontal sum of x[l], in the same order.
inline Vector horizontal_sums(const Vector (&x)[kLanes]) {
#if defined(__AVX512F__)
  // Quarters of a vector have 4 lanes. After two folds, quarter j of quarters[i] has the partial
  // sums of x[4 j + i]; two more folds inside the quarters put the sums of x[4 j] to x[4 j + 3]
  // side by side in quarter j.
  auto at = [&](int l) { return reinterpret_cast<__m512>(x[l]); };
  auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  auto pairs = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  __m512 quarters[4];
  for (int i = 0; i < 4; ++i)
    quarters[i] = pairs(halves(at(i), at(i + 4)), halves(at(i + 8), at(i + 12)));
  auto inside = [](__m512 a, __m512 b) {
    __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  };
  __m512 a = inside(quarters[0], quarters[1]), b = inside(quarters[2], quarters[3]);
  return reinterpret_cast<Vector>(
      _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)));
#else
  Vector sums;
  for (int l = 0; l < kLanes; ++l) sums[l] = horizontal_sum(x[l]);
  return sums;
#endif
}

// Elements of bfloat16 weights in one vector.
constexpr int kPair = 2 * kLanes;

// Part of a dot product: `add` takes kWidth elements of a row of weights and of a row of x,
// `add_first` the last n of a row if fewer. A dot product has kPlaces such sums, so that additions
// need not wait for each other. For two rows of x or more, kRows rows of weights are read together.
template <class T>
struct Sum;

template <>
struct Sum<float> {
  static constexpr int kWidth = kLanes, kPlaces = 2, kRows = kManyRegisters ? 4 : 2;
  Vector sum = {};
  void add(const float* weight, const float* x) { sum += load(weight) * load(x); }
  void add_first(const float* weight, const float* x, int64_t n) {
    sum += load_first<Vector>(weight, n) * load_first<Vector>(x, n);
  }
  Vector total() const { return sum; }
};

#if defined(__AVX512BF16__)

inline __m512bh load_pairs(const BFloat16* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}

template <>
struct Sum<BFloat16> {
  static constexpr int kWidth = kPair, kPlaces = 2, kRows = 4;
  __m512 sum = _mm512_setzero_ps();
  void add(const BFloat16* weight, const BFloat16* x) {
    sum = _mm512_dpbf16_ps(sum, load_pairs(weight), load_pairs(x));
  }
  void add_first(const BFloat16* weight, const BFloat16* x, int64_t n) {
    sum = _mm512_dpbf16_ps(sum, load_first<__m512bh>(weight, n), load_first<__m512bh>(x, n));
  }
  Vector total() const { return reinterpret_cast<Vector>(sum); }
};

#else

// x is float32 here, with the even elements of each run of kPair before the odd ones, and the last
// run padded with zeros: a 32-bit word of weights holds an even element in its low half and an odd
// one in its high half.
template <>
struct Sum<BFloat16> {
  static constexpr int kWidth = kPair, kPlaces = 1, kRows = 4;
  Vector even = {}, odd = {};
  void add(const BFloat16* weight, const float* x) { add(load_bits(weight), x); }
  void add_first(const BFloat16* weight, const float* x, int64_t n) {
    add(load_first<Bits>(weight, n), x);
  }
  void add(Bits w, const float* x) {
    even += reinterpret_cast<Vector>(w << 16) * load(x);
    odd += reinterpret_cast<Vector>(w & 0xffff0000u) * load(x + kLanes);
  }
  Vector total() const { return even + odd; }
};

#endif

typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
typedef int16_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kWords = kVectorBytes / 2;

// kWords int8 numbers, widened to 16 bits.
inline Words widen_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(
      _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(
      _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Words x;
  for (int l = 0; l < kWords; ++l) x[l] = p[l];
  return x;
#endif
}

// The first n of them, fewer than kWords, followed by zeros.
inline Words widen_first_bytes(const int8_t* p, int64_t n) {
#if defined(__AVX512F__)
  auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  return reinterpret_cast<Words>(_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, p)));
#else
  int8_t rest[kWords] = {};
  memcpy(rest, p, n);
  return widen_bytes(rest);
#endif
}

// sum + w x, with the products of two neighbours added in one lane.
inline Integers add_pairs(Integers sum, Words w, const int16_t* p) {
  Words x;
  memcpy(&x, p, sizeof x);
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Integers>(
      _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(w),
                          reinterpret_cast<__m512i>(x)));
#elif defined(__AVX512F__)
  return sum + reinterpret_cast<Integers>(
                   _mm512_madd_epi16(reinterpret_cast<__m512i>(w), reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
  return sum + reinterpret_cast<Integers>(
                   _mm256_madd_epi16(reinterpret_cast<__m256i>(w), reinterpret_cast<__m256i>(x)));
#else
  for (int l = 0; l < kLanes; ++l) sum[l] += w[2 * l] * x[2 * l] + w[2 * l + 1] * x[2 * l + 1];
  return sum;
#endif
}

// x is integers here, of kUnitBits and a sign, in multiples of the row's unit. Two halves of 16
// bits are summed separately, and exactly up to kMost numbers: halves are at most 2^14, so a lane
// stays below 2^30. A run of kWidth has all upper halves first.
template <>
struct Sum<int8_t> {
  static constexpr int kWidth = kWords, kPlaces = kManyRegisters ? 2 : 1, kRows = 2;
  static constexpr int kUnitBits = 29, kHalfBits = 15;
  static constexpr int64_t kMost = 256 * kPlaces * kWidth;
  Integers upper = {}, lower = {};
  void add(const int8_t* weight, const int32_t* x) { add(widen_bytes(weight), x); }
  void add_first(const int8_t* weight, const int32_t* x, int64_t n) {
    add(widen_first_bytes(weight, n), x);
  }
  void add(Words w, const int32_t* x) {
    const auto* halves = reinterpret_cast<const int16_t*>(x);
    upper = add_pairs(upper, w, halves), lower = add_pairs(lower, w, halves + kWords);
  }
  Vector total() const {
    constexpr float kUpper = 1 << kHalfBits;
    return __builtin_convertvector(upper, Vector) * kUpper + __builtin_convertvector(lower, Vector);
  }
};

// The form of a row of x that the dot products read: x itself, or numbers of four bytes in the
// order they need, `size` of them and padding of the last run. For quantised weights x may have
// either type, and the products are in multiples of the row's unit.
template <class T>
struct Operand {
  using type = T;
  static const T* make(const T* x, int64_t, float*) { return x; }
  static const T* made(const T* x, const float*) { return x; }
  static float unit(const float*, int64_t) { return 1.0f; }
};

#if !defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
  using type = float;
  static const float* make(const BFloat16* x, int64_t size, float* out) {
    int64_t whole = size / kPair * kPair;
    for (int64_t i = 0; i < whole; i += kPair) run(x + i, out + i);
    if (whole < size) {
      BFloat16 last[kPair] = {};
      memcpy(last, x + whole, (size - whole) * sizeof(BFloat16));
      run(last, out + whole);
    }
    return out;
  }
  static void run(const BFloat16* x, float* out) {
    for (int64_t l = 0; l < kLanes; ++l) {
      out[l] = widen(x[2 * l]);
      out[kLanes + l] = widen(x[2 * l + 1]);
    }
  }
  static const float* made(const BFloat16*, const float* out) { return out; }
  static float unit(const float*, int64_t) { return 1.0f; }
};
#endif

template <>
struct Operand<int8_t> {
  using type = int32_t;
  // The unit is a power of two in which the largest number has kUnitBits, or NaN if x has a NaN or
  // an infinity. The numbers are followed by zeros up to prepared_numbers.
  template <class X>
  static const int32_t* make(const X* x, int64_t size, float* out) {
    uint32_t largest = 0;
    for (int64_t j = 0; j < size; ++j) {
      uint32_t magnitude = to_bits(widen(x[j])) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    // the least exponent with all numbers below 2^exponent and all factors in the normal range
    int exponent = static_cast<int>(largest >> 23) - 126;
    exponent = exponent < -90 ? -90 : exponent;
    float factor = power_of_two(Sum<int8_t>::kUnitBits - exponent);
    int64_t filled = prepared_numbers(size);
    float& unit = out[filled];
    unit = power_of_two(exponent - Sum<int8_t>::kUnitBits);
    if (largest >= 0x7f800000u) unit = from_bits(0x7fc00000u), factor = 0.0f, size = 0;
    auto* halves = reinterpret_cast<int16_t*>(out);
    for (int64_t i = 0; i < filled; i += kWords, halves += 2 * kWords) {
      float run[kWords] = {};
      int64_t n = at_most(size - i, kWords);
      for (int64_t l = 0; l < n; ++l) run[l] = widen(x[i + l]) * factor;
      split(run, halves);
    }
    return made(x, out);
  }
  // Upper halves, then lower halves: the signed remainders of rounding to the upper ones.
  static void split(const float* run, int16_t* halves) {
    constexpr int kBits = Sum<int8_t>::kHalfBits;
    for (int l = 0; l < kWords; ++l) {
      int32_t number = static_cast<int32_t>(__builtin_rintf(run[l]));
      int32_t upper = (number + (1 << (kBits - 1))) >> kBits;
      halves[l] = static_cast<int16_t>(upper);
      halves[kWords + l] = static_cast<int16_t>(number - upper * (1 << kBits));
    }
  }
  static float power_of_two(int exponent) { return from_bits(static_cast<uint32_t>(exponent + 127) << 23); }
  template <class X>
  static const int32_t* made(const X*, const float* out) {
    return reinterpret_cast<const int32_t*>(out);
  }
  static float unit(const float* out, int64_t size) { return out[prepared_numbers(size)]; }
};

// How many weights ahead a single stream is prefetched, once per line; 0 for no prefetching. int8
// takes more of the processor's work per byte, so without it too few lines are in flight. For
// bfloat16 it is faster on AVX2, whose vectors have half a line, and slower on AVX-512.
template <class T>
constexpr int64_t kAhead = sizeof(T) == 1 ? 8192 : sizeof(T) == 2 && kVectorBytes == 32 ? 512 : 0;

// Dot products of R rows of weights, row(r), with M rows of x: done(r, m, sums) gets each of them
// as a vector whose lanes are still to be added.
template <int R, int M, class T, class Row, class Done>
inline void each_dot(const Row& row, const typename Operand<T>::type* const* x, int64_t size,
                     const Done& done) {
  constexpr int kWidth = Sum<T>::kWidth, kPlaces = Sum<T>::kPlaces;
  static_assert(kPlaces <= 2, "one vector at most may be left");
  Sum<T> sum[kPlaces][R][M];
  auto add = [&](int place, int64_t i) {
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) sum[place][r][m].add(row(r) + i, x[m] + i);
  };
  auto add_all = [&](int64_t i) {
    for (int place = 0; place < kPlaces; ++place) add(place, i + place * kWidth);
  };
  constexpr int kTogether = kPlaces * kWidth, kLine = 64 / sizeof(T);
  // a whole line per prefetch; int8, with more vectors per line, was slower that way
  constexpr int kStep = sizeof(T) == 1 ? kTogether : kLine;
  int64_t i = 0;
  if constexpr (kAhead<T> > 0 && R * M == 1)
    for (; i + kStep <= size; i += kStep) {
      if (i % kLine < kStep) __builtin_prefetch(row(0) + i + kAhead<T>, 0, sizeof(T) == 1 ? 2 : 3);
      for (int j = 0; j < kStep; j += kTogether) add_all(i + j);
    }
  for (; i + kTogether <= size; i += kTogether) add_all(i);
  if (i + kWidth <= size) add(0, i), i += kWidth;
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) {
      if (i < size) sum[0][r][m].add_first(row(r) + i, x[m] + i, size - i);
      Vector total = sum[0][r][m].total();
      if constexpr (kPlaces == 2) total += sum[1][r][m].total();
      done(r, m, total);
    }
}

// Dot products of more numbers than can be summed in integers.
template <int R, int M>
void dots_of_parts(const int8_t* weight, int64_t stride, const int32_t* const* x, int64_t size,
                   float (*out)[kMaxRows]) {
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      out[r][m] = 0.0f;
      for (int64_t i = 0; i < size; i += Sum<int8_t>::kMost) {
        const int32_t* part = x[m] + i;
        each_dot<1, 1, int8_t>([&](int) { return weight + r * stride + i; }, &part,
                               at_most(size - i, Sum<int8_t>::kMost),
                               [&](int, int, Vector sums) { out[r][m] += horizontal_sum(sums); });
      }
    }
}

// out[r][m]: dot products with rows of weights that are `stride` apart.
template <int R, int M, class T>
inline void dots(const T* weight, int64_t stride, const typename Operand<T>::type* const* x,
                 int64_t size, float (*out)[kMaxRows]) {
  if constexpr (sizeof(T) == 1) {
    if (size > Sum<T>::kMost) return dots_of_parts<R, M>(weight, stride, x, size, out);
  }
  each_dot<R, M, T>([&](int r) { return weight + r * stride; }, x, size,
                    [&](int r, int m, Vector sums) { out[r][m] = horizontal_sum(sums); });
}

// Dot products with any number of rows of x, in groups of MOST, 2 and 1 whose sums fit in the
// registers; for the second and later groups the weights come from the cache.
template <int R, int MOST, class T>
inline void products(const T* weight, int64_t stride, const typename Operand<T>::type* const* x,
                     int64_t rows, int64_t size, float (*out)[kMaxRows]) {
  int64_t m = 0;
  auto columns = [&] { return reinterpret_cast<float(*)[kMaxRows]>(out[0] + m); };
  for (; m + MOST <= rows; m += MOST) dots<R, MOST>(weight, stride, x + m, size, columns());
  if constexpr (MOST > 2)
    for (; m + 2 <= rows; m += 2) dots<R, 2>(weight, stride, x + m, size, columns());
  for (; m < rows; ++m) dots<R, 1>(weight, stride, x + m, size, columns());
}

// The bfloat16 numbers at p[0] and p[1], each in all lanes.
inline void read_pair(const BFloat16* p, Vector* first, Vector* second) {
  int32_t number;
  memcpy(&number, p, sizeof number);
#if defined(__AVX512F__)
  Bits both = reinterpret_cast<Bits>(_mm512_broadcastd_epi32(_mm_cvtsi32_si128(number)));
#elif defined(__AVX2__)
  Bits both = reinterpret_cast<Bits>(_mm256_broadcastd_epi32(_mm_cvtsi32_si128(number)));
#else
  Bits both = Bits{} + static_cast<uint32_t>(number);
#endif
  *first = reinterpret_cast<Vector>(both << 16);
  *second = reinterpret_cast<Vector>(both & 0xffff0000u);
}

// Dot product of a row of int4 weights with a row of x in the form for int8: a group is summed
// exactly, in integers, then multiplied by its scale.
struct Int4Sum {
  static constexpr int64_t kPieces = kInt4Group / kWords;
  static_assert(kPieces * kVectorBytes == kInt4Unit / 2, "a group is a place in all words of a unit");
  Vector upper = {}, lower = {};
  void add(const Words (&packed)[kPieces], const int32_t* x, const Vector (&scales)[4]) {
    // a separate sum, so that the next unit need not wait for it
    Int4Sum unit;
    unit.add_group<0>(packed, x, scales[0]), unit.add_group<1>(packed, x, scales[1]);
    unit.add_group<2>(packed, x, scales[2]), unit.add_group<3>(packed, x, scales[3]);
    upper += unit.upper, lower += unit.lower;
  }
  // The group at bit 4 j of the words.
  template <int j>
  void add_group(const Words (&packed)[kPieces], const int32_t* x, Vector scale) {
    Integers whole = {}, rest = {};
    for (int64_t piece = 0; piece < kPieces; ++piece) {
      Words w = (packed[piece] << (12 - 4 * j)) >> 12;
      const auto* halves = reinterpret_cast<const int16_t*>(x + kInt4Group * j + kWords * piece);
      whole = add_pairs(whole, w, halves), rest = add_pairs(rest, w, halves + kWords);
    }
    upper += __builtin_convertvector(whole, Vector) * scale;
    lower += __builtin_convertvector(rest, Vector) * scale;
  }
  float total() const {
    constexpr float kUpper = 1 << Sum<int8_t>::kHalfBits;
    return horizontal_sum(upper * kUpper + lower);
  }
};

// Dot products with M rows of x.
template <int M>
inline void int4_dots(const uint8_t* weight, const BFloat16* scale, const int32_t* const* x,
                      int64_t size, float* out) {
  Int4Sum sum[M];
  for (int64_t i = 0; i < size; i += kInt4Unit, weight += kInt4Unit / 2, scale += 4) {
    __builtin_prefetch(weight + kAhead<int8_t>, 0, 2);
    Words packed[Int4Sum::kPieces];
    for (int64_t piece = 0; piece < Int4Sum::kPieces; ++piece)
      memcpy(&packed[piece], weight + piece * kVectorBytes, kVectorBytes);
    Vector scales[4];
    read_pair(scale, &scales[0], &scales[1]), read_pair(scale + 2, &scales[2], &scales[3]);
    for (int m = 0; m < M; ++m) sum[m].add(packed, x[m] + i, scales);
  }
  for (int m = 0; m < M; ++m) out[m] = sum[m].total();
}

inline float* scratch_row(const Linear& a, int64_t m) {
  return a.scratch + m * prepared_row(a.inputs);
}

inline void linear_prepare(const Linear& a) {
  for (int64_t m = 0; m < a.rows; ++m) {
    float* out = scratch_row(a, m);
    if (a.scale && a.x.type == Type::kFloat32)
      Operand<int8_t>::make(row<float>(a.x, m), a.inputs, out);
    else if (a.scale)
      Operand<int8_t>::make(row<BFloat16>(a.x, m), a.inputs, out);
    else if (a.weight.type == Type::kBFloat16)
      Operand<BFloat16>::make(row<BFloat16>(a.x, m), a.inputs, out);
  }
}

// Output n of all rows of x, from sums still to be multiplied by scale and the rows' units.
template <class T>
inline void finish_linear(const Linear& a, int64_t n, const float* sums, float scale) {
  float bias_buffer[1], bias = a.bias ? *read(a.bias, 0, n, 1, bias_buffer) : 0.0f;
  for (int64_t m = 0; m < a.rows; ++m) {
    float y = sums[m] * scale * Operand<T>::unit(scratch_row(a, m), a.inputs) + bias;
    write(a.y, m, n, 1, &y);
  }
}

// R rows of weights at a time.
template <int R, class T>
inline int64_t linear_rows(const Linear& a, const typename Operand<T>::type* const* x, int64_t n,
                           int64_t end) {
  float sums[R][kMaxRows];
  for (; n + R <= end; n += R) {
    products<R, kMostTogether>(row<T>(a.weight, n), a.weight.stride, x, a.rows, a.inputs, sums);
    const float* scales = static_cast<const float*>(a.scale);
    for (int r = 0; r < R; ++r)
      finish_linear<T>(a, n + r, sums[r], scales ? scales[n + r] : 1.0f);
  }
  return n;
}

template <class T>
inline void linear_of(const Linear& a, int64_t begin, int64_t end) {
  const typename Operand<T>::type* x[kMaxRows];
  for (int64_t m = 0; m < a.rows; ++m) x[m] = Operand<T>::made(row<T>(a.x, m), scratch_row(a, m));
  if (a.rows > 1) begin = linear_rows<Sum<T>::kRows, T>(a, x, begin, end);
  linear_rows<1, T>(a, x, begin, end);
}

inline void linear_of_int4(const Linear& a, int64_t begin, int64_t end) {
  const int32_t* x[kMaxRows];
  float sums[kMaxRows];
  for (int64_t m = 0; m < a.rows; ++m) x[m] = reinterpret_cast<int32_t*>(scratch_row(a, m));
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* weight = row<uint8_t>(a.weight, n);
    const BFloat16* scale = static_cast<const BFloat16*>(a.scale) +
                            n * (prepared_numbers(a.inputs) / kInt4Group);
    int64_t m = 0;
    for (; m + 4 <= a.rows; m += 4) int4_dots<4>(weight, scale, x + m, a.inputs, sums + m);
    for (; m + 2 <= a.rows; m += 2) int4_dots<2>(weight, scale, x + m, a.inputs, sums + m);
    if (m < a.rows) int4_dots<1>(weight, scale, x + m, a.inputs, sums + m);
    finish_linear<int8_t>(a, n, sums, 1.0f);
  }
}

inline void linear(const Linear& a, int64_t begin, int64_t end) {
  if (a.weight.type == Type::kFloat32)
    linear_of<float>(a, begin, end);
  else if (a.weight.type == Type::kBFloat16)
    linear_of<BFloat16>(a, begin, end);
  else if (a.weight.type == Type::kInt8)
    linear_of<int8_t>(a, begin, end);
  else
    linear_of_int4(a, begin, end);
}

// out[j] = weight[first + j] . x for n rows of a narrow matrix and one row of x; scale as in Linear.
template <class T, class X>
inline void narrow_products_of(const Rows& weight, const X* x, int64_t size, int64_t first,
                               int64_t n, float* out) {
  float buffer[prepared_row(kBlock)], sum[1][kMaxRows];
  for (int64_t j = 0; j < n; ++j) out[j] = 0.0f;
  for (int64_t i = 0; i < size; i += kBlock) {
    int64_t part = at_most(size - i, kBlock);
    const typename Operand<T>::type* ready = Operand<T>::make(x + i, part, buffer);
    for (int64_t j = 0; j < n; ++j) {
      dots<1, 1>(row<T>(weight, first + j) + i, 0, &ready, part, sum);
      out[j] += sum[0][0] * Operand<T>::unit(buffer, part);
    }
  }
}

inline void narrow_products(const Rows& weight, const void* scale, const Rows& x, int64_t x_row,
                            int64_t size, int64_t first, int64_t n, float* out) {
  if (weight.type == Type::kFloat32)
    narrow_products_of<float>(weight, row<float>(x, x_row), size, first, n, out);
  else if (weight.type == Type::kBFloat16)
    narrow_products_of<BFloat16>(weight, row<BFloat16>(x, x_row), size, first, n, out);
  else if (x.type == Type::kFloat32)
    narrow_products_of<int8_t>(weight, row<float>(x, x_row), size, first, n, out);
  else
    narrow_products_of<int8_t>(weight, row<BFloat16>(x, x_row), size, first, n, out);
  const float* scales = static_cast<const float*>(scale);
  for (int64_t j = 0; scales && j < n; ++j) out[j] *= scales[first + j];
}

}  // namespace RODIMUS_ISA
}  // namespace rodimus
