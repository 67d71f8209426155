// Sliding-window shared-key attention of a few new tokens against the ring cache.
//
// The window is split by position: each task scores one part for all heads and keeps the largest
// score, the sum of weights and the weighted values; a merge joins the parts. The split follows from
// the ring alone, so a sequence's result depends neither on its neighbours nor on the threads.
#pragma once

#include "linear.h"
#include "numbers.h"

namespace rodimus {
namespace RODIMUS_ISA {

template <class T>
inline void write_ring(const AttentionStep& a, int64_t b) {
  int64_t keys = a.key_heads * a.key_dim, values = a.value_heads * a.value_dim;
  for (int64_t t = 0; t < a.steps; ++t) {
    T* out = static_cast<T*>(a.cache.data) +
             (b * a.ring + (a.position[b] + t) % a.ring) * a.cache.stride;
    memcpy(out, row<T>(a.k, b * a.steps + t), keys * sizeof(T));
    memcpy(out + keys, row<T>(a.v, b * a.steps + t), values * sizeof(T));
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

// acc += sum_j weights[j] * values[j] over rows `stride` apart, four rows at a time.
template <class T>
inline void add_values(const float* weights, const T* const* values, int64_t offset, int64_t rows,
                       int64_t dim, float* __restrict__ acc) {
  int64_t j = 0;
  for (; j + 4 <= rows; j += 4) {
    const T *v0 = values[j] + offset, *v1 = values[j + 1] + offset;
    const T *v2 = values[j + 2] + offset, *v3 = values[j + 3] + offset;
    float p0 = weights[j], p1 = weights[j + 1], p2 = weights[j + 2], p3 = weights[j + 3];
#pragma GCC ivdep
    for (int64_t d = 0; d < dim; ++d)
      acc[d] += (p0 * widen(v0[d]) + p1 * widen(v1[d])) + (p2 * widen(v2[d]) + p3 * widen(v3[d]));
  }
  for (; j < rows; ++j)
    for (int64_t d = 0; d < dim; ++d) acc[d] += weights[j] * widen(values[j][offset + d]);
}

// One token against rows [0, count) of a block for the heads of one key head.
template <class T>
inline void attend_block(const AttentionStep& a, int64_t splits, int64_t b, int64_t split,
                         int64_t t, int64_t key_head, const T* const* rows, int64_t count) {
  int64_t sharing = a.heads / a.key_heads;
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
        const T* key = rows[j] + key_head * a.key_dim + i;
        products<T, 1>(key, key, 0, q, group, dim, partial);
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
      int64_t offset = a.key_heads * a.key_dim + h % a.value_heads * a.value_dim;
      add_values(weights, rows, offset, count, a.value_dim, part.values);
    }
  }
}

template <class T>
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
        attend_block(a, splits, b, split, t, head, rows + (from - p), visible);
    }
  }
}

inline void attention_write(const AttentionStep& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    a.cache.type == Type::kFloat32 ? write_ring<float>(a, b) : write_ring<BFloat16>(a, b);
}

inline void attention_scan(const AttentionStep& a, int64_t splits, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    int64_t b = task / splits, split = task % splits;
    if (a.cache.type == Type::kFloat32)
      scan_part<float>(a, splits, b, split);
    else
      scan_part<BFloat16>(a, splits, b, split);
  }
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
