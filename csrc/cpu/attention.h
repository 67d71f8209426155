// Sliding-window shared-key attention of a few new tokens against the ring cache.
//
// The window is split by position: each task scores one part for all heads and keeps the largest
// score, the sum of weights and the weighted values; a merge joins the parts. The number of parts
// depends only on the window and the number of new tokens, so a sequence's result depends neither
// on other sequences nor on the threads.
#pragma once

#include "../int8_values.h"
#include "linear.h"
#include "numbers.h"

namespace rodimus {
namespace RODIMUS_ISA {

template <int N>
struct Number {
  static constexpr int value = N;
};

template <class T>
inline void quantize_head(const T* v, int64_t dim, int8_t* values, uint16_t* scale) {
  uint32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    uint32_t x = magnitude(widen(v[d]));
    largest = x > largest ? x : largest;
  }
  *scale = scale_of(largest);
  float step = scale_value(*scale);
  for (int64_t d = 0; d < dim; ++d) values[d] = static_cast<int8_t>(step_of(widen(v[d]), step));
}

template <class T, bool INT8>
inline void write_ring(const AttentionStep& a, int64_t b) {
  int64_t keys = a.key_heads * a.key_dim, values = a.value_heads * a.value_dim;
  for (int64_t t = 0; t < a.steps; ++t) {
    T* out = static_cast<T*>(a.cache.data) +
             (b * a.ring + (a.position[b] + t) % a.ring) * a.cache.stride;
    const T* v = row<T>(a.v, b * a.steps + t);
    memcpy(out, row<T>(a.k, b * a.steps + t), keys * sizeof(T));
    if constexpr (INT8) {
      Int8Row at = int8_row(keys * sizeof(T), a.value_heads, a.value_dim);
      char* bytes = reinterpret_cast<char*>(out);
      for (int64_t h = 0; h < a.value_heads; ++h)
        quantize_head(v + h * a.value_dim, a.value_dim,
                      reinterpret_cast<int8_t*>(bytes + at.values_at) + h * a.value_dim,
                      reinterpret_cast<uint16_t*>(bytes + at.scales_at) + h);
    } else {
      memcpy(out + keys, v, values * sizeof(T));
    }
  }
}

// What one part of the window stores for a token in the scratch: for each head the largest score,
// the sum of the weights, and the weighted values.
struct Part {
  float *largest, *sum, *values;
  int64_t stride;  // from one head's values to the next

  Part(const AttentionStep& a, int64_t splits, int64_t b, int64_t split, int64_t t) {
    stride = whole_vectors(a.value_dim);
    largest = a.scratch + ((b * splits + split) * a.steps + t) * part_size(a.heads, a.value_dim);
    sum = largest + whole_vectors(a.heads);
    values = sum + whole_vectors(a.heads);
  }
};

// Numbers as vectors of float32: kLanes of them in order, or kPair of bfloat16 as one vector of the
// even ones and one of the odd ones. Weighted values stay in this order until they are merged.
template <class V>
struct Wide {
  static constexpr int kVectors = 1;
  static void make(const float* p, Vector* out) { *out = load(p); }
  // with intrinsics, because compilers widen the bytes of a loop one by one
  static void make(const int8_t* p, Vector* out) {
#if defined(__AVX512F__)
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    *out = reinterpret_cast<Vector>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    *out = reinterpret_cast<Vector>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
    for (int l = 0; l < kLanes; ++l) (*out)[l] = static_cast<float>(p[l]);
#endif
  }
};

template <>
struct Wide<BFloat16> {
  static constexpr int kVectors = 2;
  static void make(const BFloat16* p, Vector* out) {
    Bits w = load_bits(p);
    out[0] = reinterpret_cast<Vector>(w << 16);
    out[1] = reinterpret_cast<Vector>(w & 0xffff0000u);
  }
};

// Prefetches the rows of the next block in memory order while this block is computed: the passes
// over keys and values read a piece of every row, with strides that a processor does not predict.
// Only some lines at a time, so that other loads need not wait, and into the second-level cache: a
// block of a wide model is larger than the first level, which also allows fewer pending lines.
struct ReadAhead {
  const char* at;
  int64_t lines;  // of a whole block

  void part(int64_t parts) {
    for (int64_t i = 0; i < lines; i += parts, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// scores[m][j] += q[m] . keys[j], for M heads.
template <int M, class T>
inline void add_scores(const typename Operand<T>::type* const* q, const T* const* keys, int64_t dim,
                       float* const* scores) {
  constexpr int R = kManyRegisters ? 4 : 2;
  for (int first = 0; first < kKeyBlock; first += kLanes) {
    Vector products[M][kLanes];
    for (int j = 0; j < kLanes; j += R)
      each_dot<R, M, T>([&](int r) { return keys[first + j + r]; }, q, dim,
                        [&](int r, int m, Vector sums) { products[m][j + r] = sums; });
    for (int m = 0; m < M; ++m)
      store(scores[m] + first, load(scores[m] + first) + horizontal_sums(products[m]));
  }
}

// scores[m][j] = q[m] . key of rows[j], for M heads whose key is at `offset` from a row's start.
template <int M, class T>
inline void score(const T* const* q, const T* const* rows, int64_t offset, int64_t dim,
                  float* const* scores) {
  const typename Operand<T>::type* ready[M];
  const T* keys[kKeyBlock];
  float buffer[M][kBlock];
  for (int m = 0; m < M; ++m)
    for (int j = 0; j < kKeyBlock; ++j) scores[m][j] = 0.0f;
  for (int64_t i = 0; i < dim; i += kBlock) {
    int64_t size = at_most(dim - i, kBlock);
    for (int m = 0; m < M; ++m) ready[m] = Operand<T>::make(q[m] + i, size, buffer[m]);
    for (int j = 0; j < kKeyBlock; ++j) keys[j] = rows[j] + offset + i;
    add_scores<M>(ready, keys, size, scores);
  }
}

static_assert(kKeyBlock % kLanes == 0, "scores of a block are whole vectors");

// The largest of kKeyBlock numbers, and their sum.
inline float largest_of(const float* x) {
#if defined(__AVX512F__)
  static_assert(kKeyBlock == kLanes, "one vector");
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(load(x)));
#else
  float largest = x[0];
  for (int j = 1; j < kKeyBlock; ++j) largest = x[j] > largest ? x[j] : largest;
  return largest;
#endif
}

inline float sum_of(const float* x) {
  Vector sum = load(x);
  for (int j = kLanes; j < kKeyBlock; j += kLanes) sum += load(x + j);
  return horizontal_sum(sum);
}

// acc += sum_r weights[r] * values of rows[r], which are `offset` bytes from the rows' starts.
template <int R, class V, class T>
inline void add_values(const float* weights, const T* const* rows, int64_t offset, int64_t dim,
                       float* acc) {
  constexpr int kVectors = Wide<V>::kVectors, kGroup = kVectors * kLanes;
  const V* values[R];
  for (int r = 0; r < R; ++r)
    values[r] = reinterpret_cast<const V*>(reinterpret_cast<const char*>(rows[r]) + offset);
  int64_t d = 0;
  for (; d + kGroup <= dim; d += kGroup) {
    Vector sums[kVectors], wide[kVectors];
    for (int i = 0; i < kVectors; ++i) sums[i] = load(acc + d + i * kLanes);
    for (int r = 0; r < R; ++r) {
      Wide<V>::make(values[r] + d, wide);
      for (int i = 0; i < kVectors; ++i) sums[i] += weights[r] * wide[i];
    }
    for (int i = 0; i < kVectors; ++i) store(acc + d + i * kLanes, sums[i]);
  }
  for (; d < dim; ++d)
    for (int r = 0; r < R; ++r) acc[d] += weights[r] * widen(values[r][d]);
}

// One token against the first `count` of kKeyBlock rows; the others can be read but do not count.
// Every step is done for all heads before the next, so one head's work hides another's latency.
template <class T, bool INT8>
inline void attend_block(const AttentionStep& a, const T* q, const T* const* rows, int64_t count,
                         const Part& part, ReadAhead ahead) {
  using V = typename RingValue<T, INT8>::type;
  int64_t key_bytes = a.key_heads * a.key_dim * sizeof(T);
  Int8Row at = int8_row(key_bytes, a.value_heads, a.value_dim);
  for (int64_t first = 0; first < a.heads; first += kHeads) {
    int64_t heads = at_most(a.heads - first, kHeads);
    float scores[kHeads][kKeyBlock], largest[kHeads], keep[kHeads];
    for (int64_t key = 0; key < a.key_heads; ++key) {
      auto add = [&](auto together, int64_t& g) {
        constexpr int M = decltype(together)::value;
        for (; g + (M - 1) * a.key_heads < heads; g += M * a.key_heads) {
          const T* from[M];
          float* to[M];
          for (int m = 0; m < M; ++m) {
            from[m] = q + (first + g + m * a.key_heads) * a.key_dim;
            to[m] = scores[g + m * a.key_heads];
          }
          score<M>(from, rows, key * a.key_dim, a.key_dim, to);
          ahead.part(2 * a.heads / M);
        }
      };
      // the first of these heads that uses this key
      int64_t g = ((key - first) % a.key_heads + a.key_heads) % a.key_heads;
      add(Number<2>(), g);
      add(Number<1>(), g);
    }
    for (int64_t g = 0; g < heads; ++g) {
      for (int j = 0; j < kKeyBlock; ++j)
        scores[g][j] = j < count ? a.scale * scores[g][j] : -INFINITY;
      largest[g] = largest_of(scores[g]);
    }
    float *before = part.largest + first, *sum = part.sum + first;
    for (int64_t g = 0; g < heads; ++g) {
      largest[g] = before[g] > largest[g] ? before[g] : largest[g];
      keep[g] = exponential(before[g] - largest[g]);
      before[g] = largest[g];
    }
    for (int64_t g = 0; g < heads; ++g) {
      for (int j = 0; j < kKeyBlock; ++j) scores[g][j] = exponential(scores[g][j] - largest[g]);
      sum[g] = sum[g] * keep[g] + sum_of(scores[g]);
    }
    float* values = part.values + first * part.stride;
    for (int64_t g = 0; g < heads; ++g) {
      if (keep[g] != 1.0f)
        for (int64_t d = 0; d < a.value_dim; ++d) values[g * part.stride + d] *= keep[g];
      if constexpr (INT8)
        for (int64_t j = 0; j < count; ++j) {
          const char* scales = reinterpret_cast<const char*>(rows[j]) + at.scales_at;
          scores[g][j] *= scale_value(
              reinterpret_cast<const uint16_t*>(scales)[(first + g) % a.value_heads]);
        }
    }
    auto add = [&](auto together, int64_t& j) {
      constexpr int R = decltype(together)::value;
      for (; j + R <= count; j += R) {
        int64_t head = first % a.value_heads;
        for (int64_t g = 0; g < heads; ++g) {
          add_values<R, V>(scores[g] + j, rows + j, key_bytes + head * a.value_dim * sizeof(V),
                           a.value_dim, values + g * part.stride);
          ahead.part(2 * a.heads * kKeyBlock / R);
          head = head + 1 < a.value_heads ? head + 1 : 0;
        }
      }
    };
    int64_t j = 0;
    add(Number<4>(), j);
    add(Number<1>(), j);
  }
}

template <class T, bool INT8>
inline void scan_part(const AttentionStep& a, int64_t splits, int64_t b, int64_t split) {
  for (int64_t t = 0; t < a.steps; ++t) {
    Part part(a, splits, b, split, t);
    for (int64_t h = 0; h < a.heads; ++h) part.largest[h] = -INFINITY, part.sum[h] = 0.0f;
    for (int64_t d = 0; d < a.heads * part.stride; ++d) part.values[d] = 0.0f;
  }
  // positions that any of the tokens sees, cut into equal parts
  int64_t newest = a.position[b] + a.steps - 1;
  int64_t oldest = a.position[b] - a.window + 1;
  oldest = oldest > 0 ? oldest : 0;
  int64_t count = newest - oldest + 1;
  int64_t begin = oldest + split * count / splits, end = oldest + (split + 1) * count / splits;
  const T* ring = static_cast<const T*>(a.cache.data) + b * a.ring * a.cache.stride;
  // twice kKeyBlock, because the visible part of a block may begin anywhere in it
  const T* rows[2 * kKeyBlock];
  int64_t row_bytes = a.cache.stride * sizeof(T);
  for (int64_t p = begin; p < end; p += kKeyBlock) {
    int64_t stop = at_most(p + kKeyBlock, end);
    for (int64_t j = 0; j < 2 * kKeyBlock; ++j)
      rows[j] = ring + at_most(p + j, stop - 1) % a.ring * a.cache.stride;
    ReadAhead ahead{reinterpret_cast<const char*>(rows[0]) + kKeyBlock * row_bytes,
                    kKeyBlock * row_bytes / 64};
    for (int64_t t = 0; t < a.steps; ++t, ahead.lines = 0) {
      int64_t last = a.position[b] + t, from = last - a.window + 1;
      from = from > p ? from : p;
      int64_t visible = at_most(stop, last + 1) - from;
      if (visible > 0)
        attend_block<T, INT8>(a, row<T>(a.q, b * a.steps + t), rows + (from - p), visible,
                              Part(a, splits, b, split, t), ahead);
    }
  }
}

// Call `run` with the type of the keys and whether values have 8 bits.
template <class Run>
inline void with_format(const AttentionStep& a, const Run& run) {
  auto with_values = [&](auto key) { a.int8_values ? run(key, Yes()) : run(key, No()); };
  a.cache.type == Type::kFloat32 ? with_values(float()) : with_values(BFloat16());
}

inline void attention_write(const AttentionStep& a, int64_t begin, int64_t end) {
  with_format(a, [&](auto key, auto int8) {
    for (int64_t b = begin; b < end; ++b) write_ring<decltype(key), int8.value>(a, b);
  });
}

inline void attention_scan(const AttentionStep& a, int64_t splits, int64_t begin, int64_t end) {
  with_format(a, [&](auto key, auto int8) {
    for (int64_t task = begin; task < end; ++task)
      scan_part<decltype(key), int8.value>(a, splits, task / splits, task % splits);
  });
}

inline void attention_merge(const AttentionStep& a, int64_t splits, int64_t begin, int64_t end) {
  float o[kBlock], ordered[kBlock];
  bool in_order = a.cache.type == Type::kBFloat16 && !a.int8_values;
  for (int64_t task = begin; task < end; ++task) {
    int64_t h = task % a.heads, t = task / a.heads % a.steps, b = task / (a.heads * a.steps);
    float largest = -INFINITY, sum = 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      float score = Part(a, splits, b, s, t).largest[h];
      largest = score > largest ? score : largest;
    }
    for (int64_t s = 0; s < splits; ++s) {
      Part part(a, splits, b, s, t);
      sum += part.sum[h] * exponential(part.largest[h] - largest);
    }
    for (int64_t first = 0; first < a.value_dim; first += kBlock) {
      int64_t n = at_most(a.value_dim - first, kBlock);
      for (int64_t j = 0; j < n; ++j) o[j] = 0.0f;
      for (int64_t s = 0; s < splits; ++s) {
        Part part(a, splits, b, s, t);
        float weight = exponential(part.largest[h] - largest) / sum;
        for (int64_t j = 0; j < n; ++j) o[j] += weight * part.values[h * part.stride + first + j];
      }
      if (in_order) {
        int64_t whole = n / kPair * kPair;
        for (int64_t i = 0; i < whole; i += kPair)
          for (int64_t l = 0; l < kLanes; ++l) {
            ordered[i + 2 * l] = o[i + l];
            ordered[i + 2 * l + 1] = o[i + kLanes + l];
          }
        for (int64_t i = whole; i < n; ++i) ordered[i] = o[i];
      }
      write(a.o, b * a.steps + t, h * a.value_dim + first, n, in_order ? ordered : o);
    }
  }
}

}  // namespace RODIMUS_ISA
}  // namespace rodimus
