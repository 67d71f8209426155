// Sliding-window shared-key attention of a few new tokens against the ring cache.
//
// A block takes one token of one sequence and one part of its window; a second kernel joins the
// parts. New tokens are read from the arguments and also written to their rows: a row that is
// overwritten holds a token that no query sees any more, so one launch can do both.
#pragma once

#include <cuda_pipeline.h>

#include <type_traits>

#include "../int8_values.h"
#include "common.cuh"
#include "sizes.h"

namespace rodimus {

// Softmax in powers of two: the scale of the scores includes this factor.
constexpr float kLog2E = 1.44269504f;

// Most query heads of the staged kernels: those of the models with 1.6B and 4B parameters.
constexpr int kFewHeads = 16, kManyHeads = 24;
constexpr int kAnyThreads = 128;
constexpr int kJoinThreads = 256;
constexpr int kJoinedParts = 64;

__device__ inline float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Neighbouring channels of one thread.
template <class T>
struct alignas(16) Eight {
  T value[8];
};

__device__ inline void widen_eight(const Eight<float>& x, float* out) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = x.value[i];
}

// A bfloat16 is the upper half of a float, so a pair in one word takes one operation per element.
__device__ inline void widen_eight(const Eight<__nv_bfloat16>& x, float* out) {
  const auto* pairs = reinterpret_cast<const uint32_t*>(x.value);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(pairs[i] << 16);
    out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

struct alignas(8) EightSteps {
  int8_t value[8];
};

__device__ inline void widen_eight(const EightSteps& x, float* out) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = static_cast<float>(x.value[i]);
}

__device__ inline uint32_t larger(uint32_t x, uint32_t y) { return x > y ? x : y; }

// The largest of the magnitudes of LANES neighbouring lanes, the same in all of them.
template <int LANES>
__device__ inline uint32_t largest_of_lanes(uint32_t x) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2)
    x = larger(x, __shfl_xor_sync(0xffffffffu, x, mask));
  return x;
}

// A value head of a token in 8 bits: as stored, or of a new token, quantised as it will be stored.
template <class T>
struct Int8Head {
  const int8_t* kept;
  const T* fresh;
  uint16_t scale_bits;

  __device__ Int8Head(const int8_t* values, uint16_t scale)
      : kept(values), fresh(nullptr), scale_bits(scale) {}
  // Called by all lanes of a warp together.
  __device__ Int8Head(const T* values, int dim, int lane) : kept(nullptr), fresh(values) {
    uint32_t largest = 0;
    for (int d = lane; d < dim; d += kWarp) largest = larger(largest, magnitude(widen(values[d])));
    scale_bits = scale_of(largest_of_lanes<kWarp>(largest));
  }
  __device__ float scale() const { return scale_value(scale_bits); }
  __device__ float step(int d) const {
    return fresh ? step_of(widen(fresh[d]), scale()) : static_cast<float>(kept[d]);
  }
};

// The keys of part i of `parts` of a token's window, numbered from the part's first key.
template <class T>
struct WindowPart {
  const T *ring, *k, *v;
  // elements of a row of the ring, of its keys and of its values (with 8 bits: of a new token's)
  int width, key_width, value_width, rows;
  // keys of the part, index of the first new one, ring rows of the first key and of the token
  int count, fresh, first_row, newest_row;

  __device__ WindowPart(const AttentionStep& a, int b, int t, int i, int parts) {
    // clamped because a negative position, which only the device sees, would write before the ring
    int64_t last = (a.position[b] > 0 ? a.position[b] : 0) + t;
    int visible = static_cast<int>(last < a.window ? last + 1 : a.window);
    // parts differ by at most one key; even if others are empty, the last has one, the token itself
    int share = visible / parts, shorter = parts - visible % parts;
    int begin = i * share + (i > shorter ? i - shorter : 0);
    count = share + (i >= shorter), fresh = visible - 1 - t - begin;
    key_width = static_cast<int>(a.key_heads * a.key_dim);
    value_width = static_cast<int>(a.value_heads * a.value_dim);
    width = static_cast<int>(a.cache.stride), rows = static_cast<int>(a.ring);
    newest_row = static_cast<int>(last % a.ring);
    first_row = newest_row - (visible - 1 - begin);
    first_row += first_row < 0 ? rows : 0;
    ring = static_cast<const T*>(a.cache.data) + b * a.ring * width;
    k = static_cast<const T*>(a.k.data) + b * a.steps * key_width;
    v = static_cast<const T*>(a.v.data) + b * a.steps * value_width;
  }

  // A part is no longer than the ring, so it wraps around at most once.
  __device__ const T* row(int n) const {
    int row = first_row + n;
    return ring + static_cast<int64_t>(row < rows ? row : row - rows) * width;
  }
  __device__ const T* key(int n) const { return n < fresh ? row(n) : k + (n - fresh) * key_width; }
  __device__ const T* values(int n) const {
    return n < fresh ? row(n) + key_width : v + (n - fresh) * value_width;
  }
  // Value head h of key n of a ring of 8-bit values; called by all lanes of a warp together.
  __device__ Int8Head<T> int8_head(int n, int h, int dim, int lane, const Int8Row& at) const {
    if (n >= fresh) return {v + (n - fresh) * value_width + h * dim, dim, lane};
    const char* bytes = reinterpret_cast<const char*>(row(n));
    return {reinterpret_cast<const int8_t*>(bytes + at.values_at) + h * dim,
            reinterpret_cast<const uint16_t*>(bytes + at.scales_at)[h]};
  }
  // How many of the keys are in the ring: all but the new ones.
  __device__ int kept() const { return count < fresh ? count : fresh; }
  // Whether keys n .. n + keys are neighbours in the ring.
  __device__ bool is_run(int n, int keys) const {
    int end = n + keys, turn = rows - first_row;
    return end <= count && end <= fresh && (end <= turn || n >= turn);
  }
  __device__ T* newest() const {
    return const_cast<T*>(ring) + static_cast<int64_t>(newest_row) * width;
  }
};

// What a part stores in the scratch for one head: its sum of values, and {largest score, sum of
// weights} after the values of all parts.
struct PartResult {
  float *values, *weights;

  __device__ PartResult(const AttentionStep& a, int64_t parts, int64_t part, int64_t bt,
                        int64_t h) {
    int64_t tokens = a.batch * a.steps, index = (part * tokens + bt) * a.heads + h;
    values = a.scratch + index * a.value_dim;
    weights = a.scratch + parts * tokens * a.heads * a.value_dim + 2 * index;
  }
};

template <class T>
__device__ inline void copy_async(T* to, const T* from) {
#pragma unroll
  for (int i = 0; i < 8; i += 16 / sizeof(T)) __pipeline_memcpy_async(to + i, from + i, 16);
}

template <class T>
__device__ inline void copy_if(bool there, T* to, const T* from) {
  if (there)
    copy_async(to, from);
  else
    *reinterpret_cast<Eight<T>*>(to) = {};
}

// From scores of KEYS keys over the channels of each lane of half a warp to the whole score of one
// key per lane: that of number lane / (16 / KEYS).
template <int KEYS>
__device__ inline float transpose_sum(float* score, int lane) {
  int mask = kHeadLanes / 2;
#pragma unroll
  for (int width = KEYS / 2; width > 0; width /= 2, mask /= 2) {
    bool upper = lane & mask;
#pragma unroll
    for (int j = 0; j < width; ++j) {
      float sent = upper ? score[j] : score[j + width];
      score[j] = (upper ? score[j + width] : score[j]) + __shfl_xor_sync(0xffffffffu, sent, mask);
    }
  }
  for (; mask > 0; mask /= 2) score[0] += __shfl_xor_sync(0xffffffffu, score[0], mask);
  return score[0];
}

// The softmax of one query head over the keys so far. Half a warp holds it, with eight channels per
// lane, and needs no other thread.
struct HeadSum {
  float q[8], acc[8] = {}, top = -INFINITY, total = 0.0f;

  template <class T>
  __device__ HeadSum(const T* query, float scale) {
    widen_eight(*reinterpret_cast<const Eight<T>*>(query), q);
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] *= scale * kLog2E;
  }

  // Add KEYS more keys, of which the first `present` exist; at least one does, so the maximum is
  // finite. key(j, out) and value(j, out) give the lane's channels, scale(j) a factor for values.
  template <int KEYS, class Key, class Scale, class Value>
  __device__ void add(int present, const Key& key, const Scale& scale, const Value& value) {
    constexpr int kShare = kHeadLanes / KEYS;
    int lane = threadIdx.x % kHeadLanes;
    float score[KEYS];
#pragma unroll
    for (int j = 0; j < KEYS; ++j) {
      float x[8];
      key(j, x);
      score[j] = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) score[j] += q[i] * x[i];
    }
    float mine = transpose_sum<KEYS>(score, lane);
    mine = lane / kShare < present ? mine : -INFINITY;
    float highest = fmaxf(top, mine);
#pragma unroll
    for (int mask = kShare; mask < kHeadLanes; mask *= 2)
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, mask));
    float fade = exp2f(top - highest), weight = exp2f(mine - highest);
    top = highest, total = total * fade + weight;
    weight *= scale(lane / kShare);
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] *= fade;
#pragma unroll
    for (int j = 0; j < KEYS; ++j) {
      float p = __shfl_sync(0xffffffffu, weight, j * kShare, kHeadLanes), x[8];
      value(j, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i] += p * x[i];
    }
  }

  // After the last keys: adds up the parts of the sum of weights, so that every lane has all of it.
  template <int KEYS>
  __device__ void add_lanes() {
#pragma unroll
    for (int mask = kHeadLanes / KEYS; mask < kHeadLanes; mask *= 2)
      total += __shfl_xor_sync(0xffffffffu, total, mask);
  }

  // Store the results of a part in the scratch.
  __device__ void keep(const PartResult& result) const {
    int lane = threadIdx.x % kHeadLanes;
    Eight<float> out;
#pragma unroll
    for (int i = 0; i < 8; ++i) out.value[i] = acc[i];
    *reinterpret_cast<Eight<float>*>(result.values + lane * 8) = out;
    if (lane == 0) result.weights[0] = top, result.weights[1] = total;
  }
};

// Quantise a head, eight values per lane of half a warp: writes steps, returns the scale's bits.
template <class T>
__device__ inline uint16_t quantize_eight(const Eight<T>& x, EightSteps* out) {
  float value[8];
  widen_eight(x, value);
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = larger(largest, magnitude(value[i]));
  uint16_t scale = scale_of(largest_of_lanes<kHeadLanes>(largest));
#pragma unroll
  for (int i = 0; i < 8; ++i)
    out->value[i] = static_cast<int8_t>(step_of(value[i], scale_value(scale)));
  return scale;
}

// Bytes of shared memory of the staged form.
template <class T, bool INT8, int KEYS, int STAGES>
constexpr int64_t attention_bytes(int64_t value_heads) {
  int64_t keys = kHeadDim * static_cast<int64_t>(sizeof(T));
  int64_t row = INT8 ? int8_row(keys, value_heads, kHeadDim).bytes : (1 + value_heads) * keys;
  return STAGES * KEYS * row;
}

// Tiles of KEYS keys and their values in shared memory, the keys of a tile first. A thread reads
// eight channels; which ones of a key follows from its place in half a warp.
template <class T, int KEYS>
struct PlainTiles {
  const WindowPart<T>& part;
  bool has_values;

  __device__ PlainTiles(const AttentionStep& a, const WindowPart<T>& part)
      : part(part), has_values(threadIdx.x / kHeadLanes < a.value_heads) {}

  // Start to copy keys n .. n + KEYS of the part. Keys beyond the last become 0: their weight is 0,
  // but 0 times what was there before may be NaN.
  __device__ void copy(int n, T* tile) const {
    T* keys = tile;
    T* values = keys + KEYS * kHeadDim + threadIdx.x * 8;
    if (part.is_run(n, KEYS)) {
      const T* first = part.row(n);
      for (int i = threadIdx.x; i < KEYS * kHeadLanes; i += blockDim.x)
        copy_async(keys + i * 8, first + i / kHeadLanes * part.width + i % kHeadLanes * 8);
      first += kHeadDim + threadIdx.x * 8;
#pragma unroll
      for (int j = 0; j < KEYS; ++j, first += part.width)
        if (has_values) copy_async(values + j * part.value_width, first);
      return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < KEYS * kHeadLanes; i += blockDim.x)
      copy_if(n + i / kHeadLanes < part.count, keys + i * 8,
              part.key(n + i / kHeadLanes) + i % kHeadLanes * 8);
#pragma unroll 1
    for (int j = 0; j < KEYS; ++j)
      if (has_values)
        copy_if(n + j < part.count, values + j * part.value_width,
                part.values(n + j) + threadIdx.x * 8);
  }

  // Eight channels of key j of a tile: of the key, and of the values from `channel` on.
  __device__ void key(T* tile, int j, float* out) const {
    widen_eight(*eight(tile + j * kHeadDim + threadIdx.x % kHeadLanes * 8), out);
  }
  __device__ void value(T* tile, int j, int channel, float* out) const {
    widen_eight(*eight(values(tile, j) + channel), out);
  }
  __device__ float scale(T*, int, int) const { return 1.0f; }

  // Write a token to its row of the ring.
  __device__ void keep(T* tile, int j, T* row) const {
    int channel = threadIdx.x * 8;
    if (threadIdx.x < kHeadLanes) *eight(row + channel) = *eight(tile + j * kHeadDim + channel);
    if (has_values) *eight(row + kHeadDim + channel) = *eight(values(tile, j) + channel);
  }

 private:
  static __device__ Eight<T>* eight(T* at) { return reinterpret_cast<Eight<T>*>(at); }
  __device__ T* values(T* tile, int j) const {
    return tile + KEYS * kHeadDim + j * part.value_width;
  }
};

// The same for a ring of 8-bit values: a tile consists of rows in the format of the ring.
template <class T, int KEYS>
struct Int8Tiles {
  const WindowPart<T>& part;
  bool has_values;
  Int8Row at;

  __device__ Int8Tiles(const AttentionStep& a, const WindowPart<T>& part)
      : part(part), has_values(threadIdx.x / kHeadLanes < a.value_heads),
        at(int8_row(kHeadDim * sizeof(T), a.value_heads, kHeadDim)) {}

  __device__ void copy(int n, T* tile) const {
    int size = KEYS * part.width;
    if (part.is_run(n, KEYS)) {
      const T* first = part.row(n);
      for (int i = threadIdx.x * kPiece; i < size; i += blockDim.x * kPiece)
        __pipeline_memcpy_async(tile + i, first + i, 16);
      return;
    }
#pragma unroll 1
    for (int j = 0; j < KEYS; ++j, tile += part.width) copy_row(n + j, tile);
  }

  __device__ void key(T* tile, int j, float* out) const {
    widen_eight(*eight(row(tile, j) + threadIdx.x % kHeadLanes * 8), out);
  }
  __device__ void value(T* tile, int j, int channel, float* out) const {
    widen_eight(*values(row(tile, j), channel), out);
  }
  __device__ float scale(T* tile, int j, int head) const {
    return scale_value(*scale_bits(row(tile, j), head));
  }

  __device__ void keep(T* tile, int j, T* to) const {
    T* from = row(tile, j);
    int channel = threadIdx.x * 8, head = threadIdx.x / kHeadLanes;
    if (head == 0) *eight(to + channel) = *eight(from + channel);
    if (!has_values) return;
    *values(to, channel) = *values(from, channel);
    if (threadIdx.x % kHeadLanes == 0) *scale_bits(to, head) = *scale_bits(from, head);
  }

 private:
  static constexpr int kPiece = 16 / sizeof(T);

  static __device__ Eight<T>* eight(T* at) { return reinterpret_cast<Eight<T>*>(at); }
  __device__ T* row(T* tile, int j) const { return tile + j * part.width; }
  __device__ EightSteps* values(T* row, int channel) const {
    return reinterpret_cast<EightSteps*>(reinterpret_cast<char*>(row) + at.values_at + channel);
  }
  __device__ uint16_t* scale_bits(T* row, int head) const {
    return reinterpret_cast<uint16_t*>(reinterpret_cast<char*>(row) + at.scales_at) + head;
  }

  __device__ void copy_row(int n, T* to) const {
    bool kept = n < part.fresh && n < part.count;
    for (int i = threadIdx.x * kPiece; i < part.width; i += blockDim.x * kPiece)
      if (kept)
        __pipeline_memcpy_async(to + i, part.row(n) + i, 16);
      else if (n >= part.count)
        *reinterpret_cast<Piece<T>*>(to + i) = {};
    if (kept || n >= part.count) return;
    // a new token: its values are quantised as the ring will hold them
    int channel = threadIdx.x * 8, head = threadIdx.x / kHeadLanes;
    Eight<T> given = {};
    EightSteps steps;
    if (has_values) given = *reinterpret_cast<const Eight<T>*>(part.values(n) + channel);
    uint16_t scale = quantize_eight(given, &steps);
    if (has_values) *values(to, channel) = steps;
    if (has_values && threadIdx.x % kHeadLanes == 0) *scale_bits(to, head) = scale;
    if (head == 0) copy_async(to + channel, part.key(n) + channel);
  }
};

// One key head, and an even number up to HEADS of query heads of kHeadDim channels. A tile is KEYS
// keys; STAGES - 1 tiles are in flight while one is used. Half a warp holds a query head, with
// eight channels per lane, so the softmax of a head needs no other thread.
// Grid: (parts, B * T), with 16 threads per head.
template <class T, bool INT8, int KEYS, int STAGES, int BLOCKS, int HEADS>
__global__ void __launch_bounds__(HEADS* kHeadLanes, BLOCKS) attention_staged_kernel(AttentionStep a) {
  RODIMUS_DYNAMIC_SHARED(T, shared);
  int bt = static_cast<int>(blockIdx.y), steps = static_cast<int>(a.steps);
  if (a.start != Start::kAhead) take_turn();
  WindowPart<T> part(a, bt / steps, bt % steps, blockIdx.x, gridDim.x);
  // keys in the ring can be read before the kernel that writes the new tokens has ended
  bool ahead = a.start == Start::kAhead && part.count <= part.fresh;
  if (a.start == Start::kAhead && !ahead) take_turn();
  std::conditional_t<INT8, Int8Tiles<T, KEYS>, PlainTiles<T, KEYS>> tiles(a, part);
  int tile_size = KEYS * part.width;
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    tiles.copy(s * KEYS, shared + s * tile_size);
    __pipeline_commit();
  }
  if (ahead) take_turn();

  HeadSum sum(static_cast<const T*>(a.q.data) + bt * a.q.stride + threadIdx.x * 8, a.scale);
  int h = threadIdx.x / kHeadLanes, lane = threadIdx.x % kHeadLanes;
  int value_head = h % static_cast<int>(a.value_heads), channel = value_head * kHeadDim + lane * 8;
  int stage = 0, next = STAGES - 1;
  for (int n = 0; n < part.count; n += KEYS) {
    __pipeline_wait_prior(STAGES - 2);
    // all threads see the tile, and none of them still uses the one that is overwritten next
    __syncthreads();
    tiles.copy(n + (STAGES - 1) * KEYS, shared + next * tile_size);
    // also after the last tile, so that the number of groups in flight is constant
    __pipeline_commit();
    T* tile = shared + stage * tile_size;
    sum.add<KEYS>(
        part.count - n, [&](int j, float* out) { tiles.key(tile, j, out); },
        [&](int j) { return tiles.scale(tile, j, value_head); },
        [&](int j, float* out) { tiles.value(tile, j, channel, out); });
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
  }
  sum.add_lanes<KEYS>();

  if (gridDim.x == 1) {
    Eight<T> out;
#pragma unroll
    for (int i = 0; i < 8; ++i) narrow(sum.acc[i] / sum.total, out.value + i);
    *reinterpret_cast<Eight<T>*>(static_cast<T*>(a.o.data) + bt * a.o.stride + threadIdx.x * 8) =
        out;
  } else {
    sum.keep(PartResult(a, gridDim.x, blockIdx.x, bt, h));
  }
  // the token itself is the last key of the last part, and is in the last tile
  int last = part.count - 1;
  if (blockIdx.x + 1 == gridDim.x)
    tiles.keep(shared + last / KEYS % STAGES * tile_size, last % KEYS, part.newest());
}

// Any heads of up to kMaxHeadDim channels: a warp takes a head, each lane every 32nd channel.
// Grid: (parts, B * T).
template <class T, bool INT8>
__global__ void __launch_bounds__(kAnyThreads, 4) attention_any_kernel(AttentionStep a) {
  constexpr int kPieces = kMaxHeadDim / kWarp, kTogether = 4;
  int bt = static_cast<int>(blockIdx.y), steps = static_cast<int>(a.steps);
  take_turn();
  WindowPart<T> part(a, bt / steps, bt % steps, blockIdx.x, gridDim.x);
  int lane = threadIdx.x % kWarp, dim = static_cast<int>(a.key_dim);
  int value_dim = static_cast<int>(a.value_dim);
  Int8Row at = int8_row(part.key_width * sizeof(T), a.value_heads, value_dim);
  for (int64_t h = threadIdx.x / kWarp; h < a.heads; h += kAnyThreads / kWarp) {
    float q[kPieces], acc[kPieces] = {}, top = -INFINITY, total = 0.0f;
    int64_t key_offset = h % a.key_heads * dim, value_offset = h % a.value_heads * value_dim;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      int d = lane + i * kWarp;
      q[i] = d < dim ? element(a.q, bt, h * dim + d) * (a.scale * kLog2E) : 0.0f;
    }
    for (int n = 0; n < part.count; n += kTogether) {
      float score[kTogether], highest = top;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        // a key beyond the last is replaced by key n and gets weight 0
        bool there = n + j < part.count;
        const T* key = part.key(there ? n + j : n) + key_offset;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
          if (lane + i * kWarp < dim) sum += q[i] * widen(key[lane + i * kWarp]);
        score[j] = there ? warp_sum(sum) : -INFINITY;
        highest = fmaxf(highest, score[j]);
      }
      float fade = exp2f(top - highest);
      top = highest, total *= fade;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) acc[i] *= fade;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        float p = exp2f(score[j] - highest);
        // a weight of zero times an infinite value would be NaN
        if (n + j >= part.count) break;
        int key = n + j;
        total += p;
        if constexpr (INT8) {
          int head = static_cast<int>(h % a.value_heads);
          Int8Head<T> value = part.int8_head(key, head, value_dim, lane, at);
          p *= value.scale();
#pragma unroll
          for (int i = 0; i < kPieces; ++i)
            if (lane + i * kWarp < value_dim) acc[i] += p * value.step(lane + i * kWarp);
        } else {
          const T* value = part.values(key) + value_offset;
#pragma unroll
          for (int i = 0; i < kPieces; ++i)
            if (lane + i * kWarp < value_dim) acc[i] += p * widen(value[lane + i * kWarp]);
        }
      }
    }
    PartResult result(a, gridDim.x, blockIdx.x, bt, h);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      int d = lane + i * kWarp;
      if (d >= value_dim) continue;
      if (gridDim.x == 1)
        set_element(a.o, bt, h * value_dim + d, acc[i] / total);
      else
        result.values[d] = acc[i];
    }
    if (gridDim.x > 1 && lane == 0) result.weights[0] = top, result.weights[1] = total;
  }
  if (blockIdx.x > 0) return;
  int64_t new_row = bt % steps;
  const T *key = part.k + new_row * part.key_width, *value = part.v + new_row * part.value_width;
  for (int i = threadIdx.x; i < part.key_width; i += kAnyThreads) part.newest()[i] = key[i];
  if constexpr (INT8) {
    char* bytes = reinterpret_cast<char*>(part.newest());
    for (int h = threadIdx.x / kWarp; h < a.value_heads; h += kAnyThreads / kWarp) {
      Int8Head<T> head(value + h * value_dim, value_dim, lane);
      auto* steps_of = reinterpret_cast<int8_t*>(bytes + at.values_at) + h * value_dim;
      for (int d = lane; d < value_dim; d += kWarp) steps_of[d] = static_cast<int8_t>(head.step(d));
      if (lane == 0) reinterpret_cast<uint16_t*>(bytes + at.scales_at)[h] = head.scale_bits;
    }
  } else {
    for (int i = threadIdx.x; i < part.value_width; i += kAnyThreads)
      part.newest()[part.key_width + i] = value[i];
  }
}

// Join the parts of one head. Each warp takes every eighth part, and up to kJoinedParts parts are
// in flight before the first is used. Grid: (H, B * T).
__global__ void __launch_bounds__(kJoinThreads) attention_join_kernel(AttentionStep a) {
  constexpr int kPieces = kMaxHeadDim / kWarp, kWarps = kJoinThreads / kWarp;
  constexpr int kTogether = kJoinedParts / kWarps;
  __shared__ float sums[kWarps][kMaxHeadDim], tops[kWarps], totals[kWarps];
  int64_t h = blockIdx.x, bt = blockIdx.y;
  int parts = static_cast<int>(a.parts), warp = threadIdx.x / kWarp;
  int lane = threadIdx.x % kWarp, dim = static_cast<int>(a.value_dim);
  float top = -INFINITY, total = 0.0f, acc[kPieces] = {};
  take_turn();
  for (int first = warp; first < parts; first += kJoinedParts) {
    float tops_of[kTogether], totals_of[kTogether], values[kTogether][kPieces];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      bool there = first + j * kWarps < parts;
      PartResult part(a, parts, there ? first + j * kWarps : first, bt, h);
      tops_of[j] = there ? part.weights[0] : -INFINITY, totals_of[j] = part.weights[1];
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        values[j][i] = there && lane + i * kWarp < dim ? part.values[lane + i * kWarp] : 0.0f;
    }
    float highest = top;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) highest = fmaxf(highest, tops_of[j]);
    // if none of the warp's parts has had keys so far, weights are 0 relative to any finite base
    float base = highest == -INFINITY ? 0.0f : highest, fade = exp2f(top - base);
    top = highest, total *= fade;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) acc[i] *= fade;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      float weight = exp2f(tops_of[j] - base);
      total += weight * totals_of[j];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) acc[i] += weight * values[j][i];
    }
  }
  if (lane == 0) tops[warp] = top, totals[warp] = total;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) sums[warp][lane + i * kWarp] = acc[i];
  __syncthreads();
  int d = threadIdx.x;
  if (d >= dim) return;
  float highest = tops[0], sum = 0.0f;
  total = 0.0f;
  for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, tops[w]);
  for (int w = 0; w < kWarps; ++w) {
    float weight = exp2f(tops[w] - highest);
    sum += weight * sums[w][d], total += weight * totals[w];
  }
  set_element(a.o, bt, h * dim + d, sum / total);
}

}  // namespace rodimus
