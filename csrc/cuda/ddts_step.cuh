// DDTS for one token: the recurrence alone, and the mixer around it. The state is read and written
// once, in float32, and stays in registers in between.
//
// A block of WARPS warps owns BV columns of one state; warp w owns key rows w, w + WARPS, ...; a
// lane owns BV / 32 neighbouring columns. KEYS is the number of keys, padded with zeros to a
// multiple of WARPS.
#pragma once

#include "common.cuh"
#include "sizes.h"

namespace rodimus {

constexpr int kStepWarps = 4;
constexpr int kStepThreads = kStepWarps * kWarp;

// The part of a state that one thread carries.
template <int KEYS, int BV, int WARPS>
struct StateTile {
  static constexpr int kRows = KEYS / WARPS;
  static constexpr int kColumns = BV / kWarp;
  float value[kRows][kColumns];

  // Whether four neighbours of every row can be accessed at once.
  static __device__ bool is_wide(const float* state, int64_t stride, int columns) {
    return kColumns == 4 && columns == BV && stride % 4 == 0 &&
           reinterpret_cast<uintptr_t>(state) % 16 == 0;
  }

  // `state` points at the block's first column; rows and columns beyond the sizes read as zero.
  __device__ void load(const float* state, int keys, int64_t stride, int columns) {
    int warp = threadIdx.x / kWarp, first = threadIdx.x % kWarp * kColumns;
    bool wide = is_wide(state, stride, columns);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int key = i * WARPS + warp;
      const float* row = state + key * stride + first;
      if (wide) {
        float4 four = {};
        if (key < keys) four = *reinterpret_cast<const float4*>(row);
        value[i][0] = four.x, value[i][1 % kColumns] = four.y;
        value[i][2 % kColumns] = four.z, value[i][3 % kColumns] = four.w;
        continue;
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        value[i][j] = key < keys && first + j < columns ? row[j] : 0.0f;
    }
  }

  // One token: decay, add k v^T, and leave q S in `partial`, a row of BV floats for each warp.
  __device__ void update(const float* decay, const float* k, const float* q, const float* v,
                         float* state, int keys, int64_t stride, int columns, float* partial) {
    int warp = threadIdx.x / kWarp, first = threadIdx.x % kWarp * kColumns;
    bool wide = is_wide(state, stride, columns);
    float sum[kColumns] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int key = i * WARPS + warp;
      float updated[kColumns], *row = state + key * stride + first;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        updated[j] = decay[key] * value[i][j] + k[key] * v[first + j];
        sum[j] += q[key] * updated[j];
      }
      if (key >= keys) continue;
      if (wide) {
        store_together(row, {updated[0], updated[1 % kColumns], updated[2 % kColumns],
                             updated[3 % kColumns]});
        continue;
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (first + j < columns) row[j] = updated[j];
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) partial[warp * BV + first + j] = sum[j];
  }
};

template <int WARPS>
__device__ inline float sum_of_warps(const float* partial, int width, int column) {
  float sum = 0.0f;
  for (int w = 0; w < WARPS; ++w) sum += partial[w * width + column];
  return sum;
}

// Grid: (ceil(V / BV), B * H).
template <int KEYS, int BV>
__global__ void __launch_bounds__(kStepThreads) ddts_step_kernel(DdtsStep a) {
  __shared__ float decay[KEYS], k[KEYS], q[KEYS], v[BV], partial[kStepWarps * BV];
  int64_t n = blockIdx.y, first = static_cast<int64_t>(blockIdx.x) * BV;
  int keys = static_cast<int>(a.key_dim);
  int columns = a.value_dim - first < BV ? static_cast<int>(a.value_dim - first) : BV;
  float* state = a.state + n * a.key_dim * a.value_dim + first;
  StateTile<KEYS, BV, kStepWarps> tile;
  take_turn();
  // the longest wait: the whole state is requested before anything else
  tile.load(state, keys, a.value_dim, columns);
  for (int i = threadIdx.x; i < KEYS; i += kStepThreads) {
    bool inside = i < keys;
    decay[i] = inside ? expf(element(a.log_decay, n, i)) : 0.0f;
    k[i] = inside ? element(a.k, n, i) : 0.0f;
    q[i] = inside ? a.scale * element(a.q, n, i) : 0.0f;
  }
  for (int j = threadIdx.x; j < BV; j += kStepThreads)
    v[j] = j < columns ? element(a.v, n, first + j) : 0.0f;
  __syncthreads();
  tile.update(decay, k, q, v, state, keys, a.value_dim, columns, partial);
  __syncthreads();
  for (int j = threadIdx.x; j < columns; j += kStepThreads)
    set_element(a.o, n, first + j, sum_of_warps<kStepWarps>(partial, BV, j));
}

__device__ inline float* mixer_state(const MixerStep& a, int64_t b, int64_t first) {
  return a.state + b * a.key_dim * a.value_dim + first;
}

// Load the state of tile `index` of row b.
template <int KEYS, int BV, int WARPS>
__device__ inline void load_mixer_tile(const MixerStep& a, int64_t b, int index,
                                       StateTile<KEYS, BV, WARPS>& tile) {
  int64_t first = static_cast<int64_t>(index) * BV, columns = a.value_dim - first;
  tile.load(mixer_state(a, b, first), static_cast<int>(a.key_dim), a.value_dim,
            columns < BV ? static_cast<int>(columns) : BV);
}

// Shared memory of a mixer's tile.
template <int KEYS, int BV, int WARPS>
struct MixerShared {
  float decay[KEYS], k[KEYS], q[KEYS], v[BV], partial[WARPS * BV], warps[WARPS];
};

// Tile number `index` of `parts` of row b of a mixer: BV columns, whose state the block has loaded.
template <int KEYS, int BV, int WARPS>
__device__ inline void mixer_tile(const MixerStep& a, int64_t b, int index, int parts,
                                  StateTile<KEYS, BV, WARPS>& tile,
                                  MixerShared<KEYS, BV, WARPS>& shared) {
  constexpr int kThreads = WARPS * kWarp;
  float *decay = shared.decay, *k = shared.k, *q = shared.q, *v = shared.v;
  int64_t first = static_cast<int64_t>(index) * BV;
  int keys = static_cast<int>(a.key_dim);
  int columns = a.value_dim - first < BV ? static_cast<int>(a.value_dim - first) : BV;

  float squares = 0.0f;
  for (int i = threadIdx.x; i < KEYS; i += kThreads) {
    k[i] = i < keys ? element(a.k, b, i) : 0.0f;
    squares += k[i] * k[i];
  }
  float norm = fmaxf(sqrtf(block_sum(squares, shared.warps)), a.key_eps);
  for (int i = threadIdx.x; i < KEYS; i += kThreads) {
    bool inside = i < keys;
    float select = inside ? element(a.select, b, i) : 0.0f;
    float tau = inside ? sigmoid(element(a.temper, b, i)) : 0.0f;
    decay[i] = inside ? expf(-softplus(select) * tau) : 0.0f;
    k[i] = k[i] / norm * expf(tau * log_softplus(select));
    q[i] = inside ? a.scale * element(a.q, b, i) : 0.0f;
  }
  // the threads of a column read neighbouring runs of its weights
  constexpr int kShare = kThreads < 16 * BV ? 4 : 16;
  int share = threadIdx.x % kShare, ranks = static_cast<int>(a.gate_dim);
  int run = (ranks + kShare - 1) / kShare;
  for (int j = threadIdx.x / kShare; j < BV; j += kThreads / kShare) {
    float sum = 0.0f;
    if (j < columns)
      for (int r = share * run; r < ranks && r < (share + 1) * run; ++r)
        sum += element(a.gate_weight, first + j, r) * element(a.gate_hidden, b, r);
    for (int distance = kShare / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (share == 0)
      v[j] = j < columns
                 ? sigmoid(sum + element(a.gate_bias, 0, first + j)) * element(a.x, b, first + j)
                 : 0.0f;
  }
  __syncthreads();
  tile.update(decay, k, q, v, mixer_state(a, b, first), keys, a.value_dim, columns, shared.partial);
  __syncthreads();

  float* gated = a.scratch + b * mixer_row(a.value_dim, parts);
  squares = 0.0f;
  for (int j = threadIdx.x; j < columns; j += kThreads) {
    int64_t column = first + j;
    float o = sum_of_warps<WARPS>(shared.partial, BV, j) +
              element(a.residual_weight, 0, column) * element(a.shifted, b, column);
    o *= silu(element(a.gate, b, column));
    if (a.scaled)
      set_element(a.scaled, b, column, o * element(a.norm_weight, 0, column));
    else
      gated[column] = o;
    squares += o * o;
  }
  squares = block_sum(squares, shared.warps);
  if (threadIdx.x == 0) gated[mixer_values(a.value_dim) + index] = squares;
}

// Grid: (ceil(V / BV), B). Scratch: per row, V floats before the norm, then one sum of squares per
// block, as sizes.h lays them out.
template <int KEYS, int BV>
__global__ void __launch_bounds__(kStepThreads) mixer_step_kernel(MixerStep a) {
  __shared__ MixerShared<KEYS, BV, kStepWarps> shared;
  StateTile<KEYS, BV, kStepWarps> tile;
  if (a.start != Start::kAhead) take_turn();
  load_mixer_tile(a, blockIdx.y, blockIdx.x, tile);
  if (a.start == Start::kAhead) take_turn();
  mixer_tile(a, blockIdx.y, blockIdx.x, gridDim.x, tile, shared);
}

// The norm that the blocks of mixer_step_kernel could not finish alone. Grid: (ceil(V / 128), B).
__global__ void __launch_bounds__(kStepThreads) mixer_norm_kernel(MixerStep a, int parts) {
  int64_t b = blockIdx.y, column = static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
  take_turn();
  const float* gated = a.scratch + b * mixer_row(a.value_dim, parts);
  // every block adds the parts in the same order, so the factor is the same for the whole row
  float squares = 0.0f;
  for (int part = 0; part < parts; ++part) squares += gated[mixer_values(a.value_dim) + part];
  float factor = 1.0f / sqrtf(squares / static_cast<float>(a.value_dim) + a.norm_eps);
  if (column < a.value_dim)
    set_element(a.y, b, column, gated[column] * factor * element(a.norm_weight, 0, column));
}

}  // namespace rodimus
