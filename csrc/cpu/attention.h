// Sliding-window shared-key attention of a few new tokens against the ring cache.
//
// The window is split by position: each task scores one part for all heads and keeps the largest
// score, the sum of weights and the weighted values; a merge joins the parts. The split follows from
// the ring alone, so a sequence's result depends neither on its neighbours nor on the threads.
#pragma once

#include "../int8_values.h"
#include "linear.h"
#include "numbers.h"

namespace rodimus {
namespace RODIMUS_ISA {

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

// The parts of one token and head in the scratch.
struct Part {
  float *largest, *sum, *values;

  Part(const AttentionStep& a, int64_t splits, int64_t b, int64_t split, int64_t t, int64_t h) {
    int64_t index = ((b * splits + split) * a.steps + t) * a.heads + h;
    largest = a.scratch + index * (2 + a.value_dim);
    sum = largest + 1;
    values = sum + 1;
  }
};

// acc += sum_j weights[j] * values[j], which stand `offset` bytes behind the starts of rows, four rows
// at a time.
template <class V, class T>
inline void add_values(const float* weights, const T* const* rows, int64_t offset, int64_t count,
                       int64_t dim, float* __restrict__ acc) {
  auto values = [&](int64_t j) {
    return reinterpret_cast<const V*>(reinterpret_cast<const char*>(rows[j]) + offset);
  };
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const V *v0 = values(j), *v1 = values(j + 1), *v2 = values(j + 2), *v3 = values(j + 3);
    float p0 = weights[j], p1 = weights[j + 1], p2 = weights[j + 2], p3 = weights[j + 3];
#pragma GCC ivdep
    for (int64_t d = 0; d < dim; ++d)
      acc[d] += (p0 * widen(v0[d]) + p1 * widen(v1[d])) + (p2 * widen(v2[d]) + p3 * widen(v3[d]));
  }
  for (; j < count; ++j)
    for (int64_t d = 0; d < dim; ++d) acc[d] += weights[j] * widen(values(j)[d]);
}

// Ask for a whole row in the order in which rows stand in memory. Each head's pass over the values
// of a block takes a piece of every row, and the processor does not foresee such strides.
template <class T>
inline void read_ahead(const T* row, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

// One token against rows [0, count) of a block for the heads of one key head.
template <class T, bool INT8>
inline void attend_block(const AttentionStep& a, int64_t splits, int64_t b, int64_t split,
                         int64_t t, int64_t key_head, const T* const* rows, int64_t count) {
  using V = typename RingValue<T, INT8>::type;
  int64_t sharing = a.heads / a.key_heads, key_bytes = a.key_heads * a.key_dim * sizeof(T);
  Int8Row at = int8_row(key_bytes, a.value_heads, a.value_dim);
  bool starts_row = key_head == 0;
  for (int64_t first = 0; first < sharing; first += kMaxRows) {
    int64_t group = at_most(sharing - first, kMaxRows);
    const typename Operand<T>::type* q[kMaxRows];
    float q_buffer[kMaxRows * kBlock], scores[kKeyBlock * kMaxRows], partial[1][kMaxRows];
    for (int64_t j = 0; j < count * group; ++j) scores[j] = 0.0f;
    for (int64_t i = 0; i < a.key_dim; i += kBlock) {
      int64_t dim = at_most(a.key_dim - i, kBlock);
      for (int64_t g = 0; g < group; ++g) {
        int64_t h = (first + g) * a.key_heads + key_head;
        const T* source = row<T>(a.q, b * a.steps + t) + h * a.key_dim + i;
        q[g] = Operand<T>::make(source, dim, q_buffer + g * kBlock);
      }
      for (int64_t j = 0; j < count; ++j) {
        if (starts_row && first == 0 && i == 0) read_ahead(rows[j], a.cache.stride);
        const T* key = rows[j] + key_head * a.key_dim + i;
        products<1, kManyRegisters ? 4 : 2>(key, 0, q, group, dim, partial);
        for (int64_t g = 0; g < group; ++g) scores[g * count + j] += a.scale * partial[0][g];
      }
    }
    for (int64_t g = 0; g < group; ++g) {
      int64_t h = (first + g) * a.key_heads + key_head;
      float* weights = scores + g * count;
      Part part(a, splits, b, split, t, h);
      float largest = *part.largest;
      for (int64_t j = 0; j < count; ++j) largest = weights[j] > largest ? weights[j] : largest;
      float keep = exponential(*part.largest - largest), sum = 0.0f;
      for (int64_t j = 0; j < count; ++j) {
        weights[j] = exponential(weights[j] - largest);
        sum += weights[j];
      }
      *part.largest = largest;
      *part.sum = *part.sum * keep + sum;
      for (int64_t d = 0; d < a.value_dim; ++d) part.values[d] *= keep;
      int64_t head = h % a.value_heads, offset = key_bytes + head * a.value_dim * sizeof(V);
      if constexpr (INT8)
        for (int64_t j = 0; j < count; ++j) {
          const char* scales = reinterpret_cast<const char*>(rows[j]) + at.scales_at;
          weights[j] *= scale_value(reinterpret_cast<const uint16_t*>(scales)[head]);
        }
      add_values<V>(weights, rows, offset, count, a.value_dim, part.values);
    }
  }
}

template <class T, bool INT8>
inline void scan_part(const AttentionStep& a, int64_t splits, int64_t b, int64_t split) {
  for (int64_t t = 0; t < a.steps; ++t)
    for (int64_t h = 0; h < a.heads; ++h) {
      Part part(a, splits, b, split, t, h);
      *part.largest = -INFINITY;
      *part.sum = 0.0f;
      for (int64_t d = 0; d < a.value_dim; ++d) part.values[d] = 0.0f;
    }
  // positions that any of the tokens sees, cut into equal parts
  int64_t newest = a.position[b] + a.steps - 1;
  int64_t oldest = a.position[b] - a.window + 1;
  oldest = oldest > 0 ? oldest : 0;
  int64_t count = newest - oldest + 1;
  int64_t begin = oldest + split * count / splits, end = oldest + (split + 1) * count / splits;
  const T* ring = static_cast<const T*>(a.cache.data) + b * a.ring * a.cache.stride;
  const T* rows[kKeyBlock];
  for (int64_t p = begin; p < end; p += kKeyBlock) {
    int64_t stop = at_most(p + kKeyBlock, end);
    for (int64_t j = p; j < stop; ++j) rows[j - p] = ring + j % a.ring * a.cache.stride;
    for (int64_t t = 0; t < a.steps; ++t) {
      int64_t last = a.position[b] + t, from = last - a.window + 1;
      from = from > p ? from : p;
      int64_t visible = at_most(stop, last + 1) - from;
      for (int64_t head = 0; visible > 0 && head < a.key_heads; ++head)
        attend_block<T, INT8>(a, splits, b, split, t, head, rows + (from - p), visible);
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
  float o[kBlock];
  for (int64_t task = begin; task < end; ++task) {
    int64_t h = task % a.heads, t = task / a.heads % a.steps, b = task / (a.heads * a.steps);
    float largest = -INFINITY, sum = 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      float score = *Part(a, splits, b, s, t, h).largest;
      largest = score > largest ? score : largest;
    }
    for (int64_t s = 0; s < splits; ++s) {
      Part part(a, splits, b, s, t, h);
      sum += *part.sum * exponential(*part.largest - largest);
    }
    for (int64_t first = 0; first < a.value_dim; first += kBlock) {
      int64_t n = at_most(a.value_dim - first, kBlock);
      for (int64_t j = 0; j < n; ++j) o[j] = 0.0f;
      for (int64_t s = 0; s < splits; ++s) {
        Part part(a, splits, b, s, t, h);
        float weight = exponential(*part.largest - largest) / sum;
        for (int64_t j = 0; j < n; ++j) o[j] += weight * part.values[first + j];
      }
      write(a.o, b * a.steps + t, h * a.value_dim + first, n, o);
    }
  }
}

}  // namespace RODIMUS_ISA
}  // namespace rodimus
