// The linear layers of a decode step on tensor cores: up to eight rows of x against bfloat16
// weights, with the norm before them and the elementwise operations after them in the same kernel.
//
// A block computes a tile of 16 outputs: 8 neighbours and 8 more, which are half a head or half a
// projection further on if the two are combined. Its warps share the inputs among them in units of
// 64 columns. The weights are the left operand of mma.m16n8k16 and the rows of x the eight columns
// of the right one. The order of a sum does not matter, so a lane loads 16 neighbouring bytes of
// both for what the instruction treats as separate columns: no shared memory or shuffle for
// weights.
#pragma once

#include <cuda_pipeline.h>

#include "common.cuh"
#include "elementwise.cuh"
#include "sizes.h"

namespace rodimus {

constexpr int kPiece = 8;

// Which outputs a tile has: `first` to first + 7, and eight more at a distance of `apart`.
// `channel` is the place of the first one in the rotary tables, or -1.
struct Tile {
  int first, apart, channel;
};

__device__ inline Tile tile_of(const StepLinear& a, int layer, int tile) {
  if (a.gated) return {tile * kHalfTile, static_cast<int>(a.layers[layer].outputs / 2), -1};
  if (layer >= a.rotated) return {tile * kTile, kHalfTile, -1};
  int dim = static_cast<int>(a.head_dim), half = static_cast<int>(a.half);
  int head = tile / (dim / kTile) * dim, within = tile % (dim / kTile), turned = half / kHalfTile;
  if (within < turned) return {head + within * kHalfTile, half, within * kHalfTile};
  return {head + 2 * half + (within - turned) * kTile, kHalfTile, -1};
}

// The layer of a step that has a tile, and the tile's index within that layer.
struct TileOfLayer {
  int layer, index;
};

__device__ inline TileOfLayer layer_of(const StepLinear& a, int tile) {
  TileOfLayer found = {0, tile};
  while (found.layer + 1 < a.count && found.index >= step_linear_tiles(a, found.layer))
    found.index -= static_cast<int>(step_linear_tiles(a, found.layer++));
  return found;
}

// The weights of a lane in the tile: the rows of two outputs, where outputs beyond the last repeat
// it and are not written. Of each unit it has 16 bytes at four places: two columns of each row.
struct TileWeights {
  const __nv_bfloat16 *near, *far;
  int inputs;

  __device__ TileWeights() {}
  __device__ TileWeights(const StepLinear& a, const StepLinear::Layer& layer, const Tile& tile)
      : inputs(static_cast<int>(a.inputs)) {
    int last = static_cast<int>(layer.outputs) - 1, n = tile.first + threadIdx.x % kWarp / 4;
    const __nv_bfloat16* weight = static_cast<const __nv_bfloat16*>(layer.weight.data);
    near = weight + (n < last ? n : last) * layer.weight.stride;
    n += tile.apart;
    far = weight + (n < last ? n : last) * layer.weight.stride;
  }
  // Call `take` with the number of each place and its address.
  template <class Take>
  __device__ void places(int unit, const Take& take) const {
    int column = unit * kUnit + threadIdx.x % 4 * kPiece;
    // beyond the inputs x is zero, so any finite weight will do
    int first = column < inputs ? column : 0;
    int second = column + kUnit / 2 < inputs ? column + kUnit / 2 : 0;
    take(0, near + first), take(1, far + first), take(2, near + second), take(3, far + second);
  }
};

// sum += the lane's weights of a unit times the row of x in the lane's column, if present.
__device__ inline void multiply_unit(float (&sum)[4], const uint4 (&w)[4], const __nv_bfloat16* x,
                                     bool present) {
  uint4 low = {}, high = {};
  if (present) {
    low = *reinterpret_cast<const uint4*>(x);
    high = *reinterpret_cast<const uint4*>(x + kUnit / 2);
  }
  multiply_16x8x16(sum, w[0].x, w[1].x, w[0].y, w[1].y, low.x, low.y);
  multiply_16x8x16(sum, w[0].z, w[1].z, w[0].w, w[1].w, low.z, low.w);
  multiply_16x8x16(sum, w[2].x, w[3].x, w[2].y, w[3].y, high.x, high.y);
  multiply_16x8x16(sum, w[2].z, w[3].z, w[2].w, w[3].w, high.z, high.w);
}

__device__ inline void load_piece(const Rows& x, int64_t row, int64_t column, float* out) {
  int64_t i = row * x.stride + column;
  if (x.type == Type::kFloat32) {
    const float4* data = reinterpret_cast<const float4*>(static_cast<const float*>(x.data) + i);
    float4 low = data[0], high = data[1];
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  } else {
    Piece<__nv_bfloat16> piece = *reinterpret_cast<const Piece<__nv_bfloat16>*>(
        static_cast<const __nv_bfloat16*>(x.data) + i);
#pragma unroll
    for (int e = 0; e < kPiece; ++e) out[e] = widen(piece.value[e]);
  }
}

// Start to copy the units of x that a warp multiplies to shared memory, with zeros to the end of
// the last unit. Only the warp itself reads them, so it only has to wait for its own copies.
template <int WARPS>
__device__ inline void stage(const StepLinear& a, const Rows& x, __nv_bfloat16* staged) {
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int inputs = static_cast<int>(a.inputs), stride = static_cast<int>(staged_stride(a.inputs));
  int rows = static_cast<int>(a.rows), units = (inputs + kUnit - 1) / kUnit;
  const __nv_bfloat16* data = static_cast<const __nv_bfloat16*>(x.data);
#pragma unroll 1
  for (int unit = warp; unit < units; unit += WARPS) {
#pragma unroll 1
    for (int i = lane; i < rows * (kUnit / kPiece); i += kWarp) {
      int m = i / (kUnit / kPiece), column = unit * kUnit + i % (kUnit / kPiece) * kPiece;
      __nv_bfloat16* to = staged + m * stride + column;
      if (column < inputs)
        __pipeline_memcpy_async(to, data + m * x.stride + column, sizeof(uint4));
      else
        *reinterpret_cast<uint4*>(to) = uint4{};
    }
  }
  __pipeline_commit();
}

// The same for x times the weight of its norm, with TOGETHER rows in flight; `squares` gets the
// sums of squares of these units.
template <int WARPS, int TOGETHER>
__device__ inline void stage_scaled(const StepLinear& a, const Rows& x, __nv_bfloat16* staged,
                                    float* squares) {
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int inputs = static_cast<int>(a.inputs), stride = static_cast<int>(staged_stride(a.inputs));
  int rows = static_cast<int>(a.rows), units = (inputs + kUnit - 1) / kUnit;
#pragma unroll 1
  for (int m = 0; m < rows; m += TOGETHER) {
    float sum[TOGETHER] = {};
#pragma unroll 1
    for (int i = lane;; i += kWarp) {
      int unit = warp + i / (kUnit / kPiece) * WARPS;
      if (unit >= units) break;
      int column = unit * kUnit + i % (kUnit / kPiece) * kPiece;
      bool inside = column < inputs;
      float value[TOGETHER][kPiece] = {};
      Piece<__nv_bfloat16> weight = {};
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t)
        if (inside && m + t < rows) load_piece(x, m + t, column, value[t]);
      if (inside)
        weight = *reinterpret_cast<const Piece<__nv_bfloat16>*>(
            static_cast<const __nv_bfloat16*>(a.norm_weight.data) + column);
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) {
        Piece<__nv_bfloat16> piece;
#pragma unroll
        for (int e = 0; e < kPiece; ++e) {
          sum[t] += value[t][e] * value[t][e];
          piece.value[e] = __float2bfloat16(value[t][e] * widen(weight.value[e]));
        }
        if (m + t < rows)
          *reinterpret_cast<Piece<__nv_bfloat16>*>(staged + (m + t) * stride + column) = piece;
      }
    }
#pragma unroll
    for (int t = 0; t < TOGETHER; ++t) {
      float total = warp_sum(sum[t]);
      if (lane == 0) squares[warp * kMaxRows + m + t] = total;
    }
  }
  __syncwarp();
}

// Add up sums of squares that are in pieces, one warp per row, in a fixed order.
template <int WARPS>
__device__ inline void add_squares(const StepLinear& a, float* squares) {
  int lane = threadIdx.x % kWarp;
  for (int m = threadIdx.x / kWarp; m < static_cast<int>(a.rows); m += WARPS) {
    const float* parts = a.squares + m * a.squares_stride;
    float sum = 0.0f;
#pragma unroll 4
    for (int part = lane; part < static_cast<int>(a.parts); part += kWarp) sum += parts[part];
    sum = warp_sum(sum);
    if (lane == 0) squares[m] = sum;
  }
}

__device__ inline float rounded(float x) { return widen(__float2bfloat16(x)); }

// The operands of one output besides its sum, all read before any is used or anything is written.
struct OutputOperands {
  bool inside;
  float bias = 0.0f, residual = 0.0f, scale = 0.0f;

  __device__ OutputOperands(const StepLinear& a, const StepLinear::Layer& layer, int64_t m, int64_t n)
      : inside(n < layer.outputs) {
    if (!inside) return;
    if (layer.bias) bias = element(layer.bias, 0, n);
    if (a.residual) residual = element(a.residual, m, n);
    if (a.scaled) scale = element(a.scaled_weight, 0, n);
  }
};

// Add one output to the residual stream; returns the square of the sum.
__device__ inline float finish_sum(const StepLinear& a, const OutputOperands& given, int64_t m,
                                   int64_t n, float x) {
  x = given.residual + rounded(x);
  set_element(a.sum, m, n, x);
  if (a.sum.type == Type::kBFloat16) x = rounded(x);
  if (a.scaled) set_element(a.scaled, m, n, x * given.scale);
  return x * x;
}

// What follows the products, for an output and the one `apart` from it: one thread per pair.
__device__ inline void finish_pair(const StepLinear& a, const StepLinear::Layer& layer,
                                   const Tile& tile, int64_t m, int64_t offset, float one,
                                   float other, float* squares) {
  int64_t n = tile.first + offset, far = n + tile.apart;
  OutputOperands near_given(a, layer, m, n), far_given(a, layer, m, far);
  ConvTaps<__nv_bfloat16> taps;
  bool near_conv = n < a.conv.channels && near_given.inside;
  if (near_conv) taps.load(a.conv, m, n);
  bool inside = near_given.inside, both = far_given.inside;
  one += near_given.bias, other += far_given.bias;
  if (a.gated) {
    if (both) set_element(layer.y, m, n, silu(rounded(other)) * rounded(one));
    return;
  }
  if (tile.channel >= 0) {
    float cos = element(a.cos, m, tile.channel + offset);
    float sin = element(a.sin, m, tile.channel + offset);
    float x = rounded(one), y = rounded(other);
    one = x * cos - y * sin, other = y * cos + x * sin;
  }
  if (a.residual) {
    *squares = inside ? finish_sum(a, near_given, m, n, one) : 0.0f;
    if (both) *squares += finish_sum(a, far_given, m, far, other);
    return;
  }
  if (inside) set_element(layer.y, m, n, one);
  if (both) set_element(layer.y, m, far, other);
  if (near_conv) taps.finish(a.conv, m, n, __float2bfloat16(one));
  if (far < a.conv.channels && both) {
    taps.load(a.conv, m, far);
    taps.finish(a.conv, m, far, __float2bfloat16(other));
  }
}

// Store a warp's part of the sums of a tile, [output of the tile][row of x], for `rows` rows.
__device__ inline void keep_part(float* sums, const float (&sum)[4], int rows) {
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, m = lane % 4 * 2;
  float* part = sums + (warp * kTile + lane / 4) * rows + m;
  if (m < rows) part[0] = sum[0], part[kHalfTile * rows] = sum[2];
  if (m + 1 < rows) part[1] = sum[1], part[kHalfTile * rows + 1] = sum[3];
}

// Add the parts of all warps and do what follows the products, with kFinishThreads threads. The
// sums of squares of the norm before are in `pieces` pieces of kMaxRows; 0 for no norm. The tile is
// number `index` of `tiles`.
constexpr int kFinishThreads = kHalfTile * kMaxRows;

template <int WARPS>
__device__ inline void finish_tile(const StepLinear& a, const StepLinear::Layer& layer,
                                   const Tile& tile, int thread, const float* sums, int rows,
                                   int pieces, const float* squares_of, int index, int tiles) {
  int m = thread / kHalfTile, offset = thread % kHalfTile;
  float one = 0.0f, other = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    if (m >= rows) break;
    one += sums[(i * kTile + offset) * rows + m];
    other += sums[(i * kTile + kHalfTile + offset) * rows + m];
  }
  if (pieces > 0) {
    float total = 0.0f;
    for (int i = 0; i < pieces; ++i) total += squares_of[i * kMaxRows + m];
    float factor = 1.0f / sqrtf(total / static_cast<float>(a.inputs) + a.eps);
    one *= factor, other *= factor;
  }
  if (m < a.rows && (!a.gated || tile.first + offset < layer.outputs / 2))
    finish_pair(a, layer, tile, m, offset, one, other, &squares);
  if (a.sum_squares == nullptr) return;
#pragma unroll
  for (int distance = kHalfTile / 2; distance > 0; distance /= 2)
    squares += __shfl_xor_sync(0xffffffffu, squares, distance);
  if (offset == 0 && m < a.rows) a.sum_squares[m * tiles + index] = squares;
}

// Grid: tiles of all layers. Dynamic shared memory: rows of x, staged_stride(inputs) apart. A lane
// has 4 * DEPTH loads of 16 bytes in flight. SCALED: most rows of x that the kernel multiplies by
// the weight of their norm; 0 if that has been done.
template <int WARPS, int DEPTH, int BLOCKS, int SCALED>
__global__ void __launch_bounds__(WARPS* kWarp, BLOCKS) step_linear_kernel(StepLinear a) {
  RODIMUS_DYNAMIC_SHARED(__nv_bfloat16, staged);
  // squares: of each warp's units, or of all units in the first warp's place
  __shared__ float sums[WARPS * kWarpSums], squares_of[WARPS * kWarpSquares];
  TileOfLayer place = layer_of(a, static_cast<int>(blockIdx.x));
  const StepLinear::Layer& layer = a.layers[place.layer];
  Tile tile = tile_of(a, place.layer, place.index);
  TileWeights weights(a, layer, tile);

  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4, quad = lane % 4;
  int inputs = static_cast<int>(a.inputs), units = (inputs + kUnit - 1) / kUnit;
  uint4 w[DEPTH][4];
  auto load = [&](uint4(&to)[4], int unit) {
    weights.places(unit, [&](int i, const __nv_bfloat16* from) { to[i] = load_once(from); });
  };
  auto load_some = [&](int first, int end) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
      if (d >= first && d < end && warp + d * WARPS < units) load(w[d], warp + d * WARPS);
  };
  // units requested before x is read, or even written, as far as the registers hold both
  constexpr int kEarly = SCALED == 0 ? DEPTH : SCALED == 1 ? DEPTH / 2 : 0;
  if (a.start == Start::kAhead) {
    load_some(0, kEarly);
    take_turn();
  } else {
    // tiles that start later have nothing to wait for, and would only request weights twice
    if (blockIdx.x < a.together && warp == 0 && lane < kTile) {
      int row = tile.first + lane % kHalfTile + (lane < kHalfTile ? 0 : tile.apart);
      int last = static_cast<int>(layer.outputs) - 1;
      const auto* weight = static_cast<const __nv_bfloat16*>(layer.weight.data);
      prefetch(weight + (row < last ? row : last) * layer.weight.stride,
               static_cast<uint32_t>(inputs * sizeof(__nv_bfloat16)));
    }
    take_turn();
    load_some(0, kEarly);
  }

  if (SCALED > 0) {
    stage_scaled<WARPS, SCALED == 1 ? 1 : 4>(a, layer.x, staged, squares_of);
    load_some(kEarly, DEPTH);
  } else {
    stage<WARPS>(a, layer.x, staged);
    if (a.squares != nullptr) add_squares<WARPS>(a, squares_of);
    __pipeline_wait_prior(0);
    __syncwarp();
  }

  float sum[4] = {};
  const __nv_bfloat16* x = staged + group * staged_stride(inputs) + quad * kPiece;
  bool present = group < a.rows;
#pragma unroll 1
  for (int first = warp; first < units; first += DEPTH * WARPS) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      int unit = first + d * WARPS;
      if (unit >= units) break;
      multiply_unit(sum, w[d], x + unit * kUnit, present);
      if (unit + DEPTH * WARPS < units) load(w[d], unit + DEPTH * WARPS);
    }
  }

  keep_part(sums, sum, kMaxRows);
  __syncthreads();
  if (threadIdx.x < kFinishThreads)
    finish_tile<WARPS>(a, layer, tile, threadIdx.x, sums, kMaxRows,
                       SCALED ? WARPS : a.squares != nullptr, squares_of, blockIdx.x, gridDim.x);
}

}  // namespace rodimus
