// One token through a whole block of the model in one kernel. Its thread blocks, one on each
// multiprocessor, wait for each other where a layer needs all of the previous one; meanwhile they
// load what they need next, because weights, states and the ring do not depend on the token.
//
// For a warp, the weights of all layers are one stream: units of 16 outputs by 64 inputs, in the
// order in which it multiplies them, and between the layers of attention the keys and values that
// its heads read. Each lane copies its own pieces to shared memory, STAGES units ahead, across
// tiles and layers, and reads them back itself, so no thread waits for another.
#pragma once

#include "attention.cuh"
#include "ddts_step.cuh"
#include "step_linear.cuh"

namespace rodimus {

// The first tile of a step for this block. Tiles are dealt out to the blocks in turn, and each step
// goes on with the block after the one that got the previous step's last tile.
__device__ inline int first_tile(const BlockStep& a, int step) {
  int blocks = static_cast<int>(gridDim.x);
  int first = (static_cast<int>(blockIdx.x) - a.before[step]) % blocks;
  return first < 0 ? first + blocks : first;
}

// Attention of one key head and heads of kHeadDim channels: kHeadLanes threads per head, so a block
// takes several parts of the window.
struct AttentionShare {
  // head and lane of a thread, its first part, the distance to its next, and parts of all sequences
  int h, lane, first, stride, items;

  __device__ AttentionShare(const AttentionStep& a) {
    int threads = static_cast<int>(a.heads) * kHeadLanes, thread = static_cast<int>(threadIdx.x);
    int together = kPersistentThreads / threads, share = thread / threads;
    stride = static_cast<int>(gridDim.x) * together;
    items = static_cast<int>(a.parts * a.batch);
    // threads that are too few for another part get none
    first = share < together ? static_cast<int>(blockIdx.x) * together + share : items;
    h = thread % threads / kHeadLanes, lane = thread % kHeadLanes;
  }
  __device__ static WindowPart<__nv_bfloat16> part_of(const AttentionStep& a, int item) {
    int parts = static_cast<int>(a.parts);
    return {a, item / parts, 0, item % parts, parts};
  }
  __device__ int channel_of_values(const AttentionStep& a) const {
    return h % static_cast<int>(a.value_heads) * kHeadDim + lane * 8;
  }
};

// Keys that are processed together, and keys of a unit: a piece of the key and one of the values.
constexpr int kKeysTogether = 4, kKeysOfUnit = 2;

// The stream of a warp's weights, keys and values.
template <int STAGES>
class Feed {
 public:
  __device__ Feed(const BlockStep& a, uint4* stages) : a_(a), mine_(stages + threadIdx.x) {
    next_ = first_tile(a, 0);
    find();
    send(kFirst);
  }
  // Fill the remaining stages; more urgent loads can be requested before this.
  __device__ void fill() { send(STAGES - kFirst); }

  // The lane's pieces of the next unit; OWED units have been taken without a send yet.
  template <int OWED = 0>
  __device__ void take(uint4* w) {
    __pipeline_wait_prior(STAGES - 1 - OWED);
    see_copies();
    int place = place_ + OWED < STAGES ? place_ + OWED : place_ + OWED - STAGES;
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = mine_[place * kPieces + i * kPersistentThreads];
  }

  // Start more copies, into the places of units that were taken and used.
  __device__ void send(int units = 1) {
#pragma unroll 1
    for (; units > 0; --units) send_one();
  }

 private:
  __device__ void send_one() {
    if (phase_ < kEnd) {
      uint4* stage = mine_ + place_ * kPieces;
      auto copy = [&](int i, const __nv_bfloat16* from) {
        __pipeline_memcpy_async(stage + i * kPersistentThreads, from, sizeof(uint4));
      };
      if (phase_ != kKeys) {
        weights_.places(unit_, copy);
        unit_ += kPersistentWarps;
      } else {
#pragma unroll
        for (int j = 0; j < kKeysOfUnit; ++j) {
          // keys beyond the last repeat it and get weight 0
          int row = first_row_ + (unit_ + j < units_ ? unit_ + j : units_ - 1);
          row -= row < a_.attention.ring ? 0 : static_cast<int>(a_.attention.ring);
          int64_t at = row * a_.attention.cache.stride;
          copy(2 * j, weights_.near + at), copy(2 * j + 1, weights_.far + at);
        }
        unit_ += kKeysOfUnit;
      }
      // keys are sent in whole groups
      if (unit_ >= units_ && (phase_ != kKeys || unit_ % kKeysTogether == 0)) find();
    }
    // also after the last unit, so that the number of groups in flight is constant
    __pipeline_commit();
    place_ = place_ + 1 == STAGES ? 0 : place_ + 1;
  }

  static constexpr int kPieces = 4 * kPersistentThreads, kFirst = 2;
  // every phase is a linear step, except for the one between those before and after attention
  static constexpr int kKeys = BlockStep::kAttend + 1, kEnd = BlockStep::kSteps + 1;

  __device__ static int step_of(int phase) { return phase - (phase > kKeys); }

  // Go on to what follows the tile, or the part, whose last unit was sent.
  __device__ void find() {
    while (phase_ < kEnd) {
      if (phase_ == kKeys ? find_keys() : find_weights()) return;
      ++phase_;
      if (phase_ == a_.count && phase_ < kKeys) phase_ = kEnd;
      if (phase_ == kEnd) return;
      next_ = phase_ == kKeys ? AttentionShare(a_.attention).first : first_tile(a_, step_of(phase_));
    }
  }
  __device__ bool find_weights() {
    int step = step_of(phase_);
    const StepLinear& a = a_.steps[step];
    unit_ = static_cast<int>(threadIdx.x) / kWarp;
    units_ = (static_cast<int>(a.inputs) + kUnit - 1) / kUnit;
    if (next_ >= a_.tiles[step] || unit_ >= units_) return false;
    TileOfLayer place = layer_of(a, next_);
    weights_ = TileWeights(a, a.layers[place.layer], tile_of(a, place.layer, place.index));
    next_ += static_cast<int>(gridDim.x);
    return true;
  }
  // The keys of a part that are in the ring: all but the token itself.
  __device__ bool find_keys() {
    const AttentionStep& a = a_.attention;
    AttentionShare share(a);
    while (next_ < share.items) {
      WindowPart<__nv_bfloat16> part = AttentionShare::part_of(a, next_);
      next_ += share.stride;
      unit_ = 0, units_ = part.kept();
      if (units_ <= 0) continue;
      first_row_ = part.first_row;
      weights_.near = part.ring + share.lane * 8;
      weights_.far = part.ring + kHeadDim + share.channel_of_values(a);
      return true;
    }
    return false;
  }

  const BlockStep& a_;
  uint4* mine_;
  int phase_ = 0, next_, unit_, units_, place_ = 0, first_row_;
  // for keys: where the lane's channels are in the ring's first row
  TileWeights weights_;
};

// Shared memory that all phases of a block use: x [rows, inputs] and floats.
struct PersistentShared {
  __nv_bfloat16* x;
  float *floats, *squares;
};

// Copy the units of x that a warp multiplies to shared memory, like stage(), but complete on return
// and with few waits, because several pieces of a lane are in flight together.
__device__ inline void stage_now(const StepLinear& a, const Rows& x, __nv_bfloat16* staged) {
  constexpr int kTogether = 4, kOfUnit = kUnit / kPiece;
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int inputs = static_cast<int>(a.inputs), stride = static_cast<int>(staged_stride(a.inputs));
  int rows = static_cast<int>(a.rows), units = (inputs + kUnit - 1) / kUnit;
  int mine = warp < units ? (units - 1 - warp) / kPersistentWarps + 1 : 0, count = mine * kOfUnit * rows;
  const __nv_bfloat16* data = static_cast<const __nv_bfloat16*>(x.data);
  // row by row: neighbouring lanes have neighbouring pieces of a unit
  auto column_of = [&](int i) {
    int within = i % (mine * kOfUnit);
    return (warp + within / kOfUnit * kPersistentWarps) * kUnit + within % kOfUnit * kPiece;
  };
#pragma unroll 1
  for (int first = lane; first < count; first += kTogether * kWarp) {
    uint4 piece[kTogether] = {};
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      int i = first + j * kWarp;
      if (i < count && column_of(i) < inputs)
        piece[j] = *reinterpret_cast<const uint4*>(data + i / (mine * kOfUnit) * x.stride + column_of(i));
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      int i = first + j * kWarp;
      if (i < count)
        *reinterpret_cast<uint4*>(staged + i / (mine * kOfUnit) * stride + column_of(i)) = piece[j];
    }
  }
}

// The linear layers of a step. What follows the products is done for several tiles at once, because
// it waits for memory.
template <int STAGES>
__device__ inline void linear_phase(const BlockStep& block, int step, Feed<STAGES>& feed,
                                    const PersistentShared& shared) {
  const StepLinear& a = block.steps[step];
  float* sums = shared.floats;
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4, quad = lane % 4;
  int rows = static_cast<int>(a.rows), inputs = static_cast<int>(a.inputs);
  int units = (inputs + kUnit - 1) / kUnit, tiles = block.tiles[step], blocks = gridDim.x;
  int size = kPersistentWarps * kTile * rows, most = kSumFloats / size;
  int together = most < kMostTiles ? most : kMostTiles;
  int pieces = a.norm_weight ? kPersistentWarps : a.squares != nullptr;
  // x of the first step was staged by stage_scaled, which multiplies it by the norm's weight
  const void* staged = a.norm_weight ? a.layers[0].x.data : nullptr;
  const __nv_bfloat16* x = shared.x + group * staged_stride(inputs) + quad * kPiece;
#pragma unroll 1
  for (int first = first_tile(block, step), begin = first; first < tiles; first += together * blocks) {
    // the sums of the tiles before may still be read
    if (first != begin) __syncthreads();
#pragma unroll 1
    for (int j = 0; j < together && first + j * blocks < tiles; ++j) {
      const Rows& from = a.layers[layer_of(a, first + j * blocks).layer].x;
      if (from.data != staged) {
        staged = from.data;
        __syncwarp();
        stage_now(a, from, shared.x);
        if (a.squares != nullptr) add_squares<kPersistentWarps>(a, shared.squares);
        __syncwarp();
      }
      float sum[4] = {};
#pragma unroll 1
      for (int unit = warp; unit < units; unit += kPersistentWarps) {
        uint4 w[4];
        feed.take(w);
        multiply_unit(sum, w, x + unit * kUnit, group < rows);
        feed.send();
      }
      keep_part(sums + j * size, sum, rows);
    }
    __syncthreads();
    int mine = threadIdx.x / kFinishThreads, i = first + mine * blocks;
    if (mine >= together || i >= tiles) continue;
    TileOfLayer place = layer_of(a, i);
    const StepLinear::Layer& layer = a.layers[place.layer];
    Tile tile = tile_of(a, place.layer, place.index);
    int thread = threadIdx.x % kFinishThreads;
    finish_tile<kPersistentWarps>(a, layer, tile, thread, sums + mine * size, rows, pieces, shared.squares,
                                  i, tiles);
  }
}

template <int KEYS>
struct MixerPhase {
  static constexpr int BV = kPersistentColumns;
  using Shared = MixerShared<KEYS, BV, kPersistentWarps>;
  static_assert(sizeof(Shared) <= kPersistentFloats * sizeof(float));
  StateTile<KEYS, BV, kPersistentWarps> tile;
  int parts, tiles;

  // Whether the registers have room for a state besides what else is kept across a wait.
  static constexpr bool kAhead = KEYS <= 64;

  // Load the first tile's state while the block waits.
  __device__ MixerPhase(const MixerStep& a)
      : parts(static_cast<int>((a.value_dim + BV - 1) / BV)), tiles(parts * static_cast<int>(a.rows)) {
    if (kAhead) load(a, static_cast<int>(blockIdx.x));
  }
  __device__ void load(const MixerStep& a, int i) {
    if (i < tiles) load_mixer_tile(a, i / parts, i % parts, tile);
  }
  __device__ void run(const MixerStep& a, const PersistentShared& shared) {
    auto* memory = reinterpret_cast<Shared*>(shared.floats);
    int blocks = static_cast<int>(gridDim.x);
    if (!kAhead) load(a, static_cast<int>(blockIdx.x));
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x); i < tiles; i += blocks) {
      mixer_tile(a, i / parts, i % parts, parts, tile, *memory);
      load(a, i + blocks);
    }
  }
};

template <int STAGES>
__device__ inline void attention_phase(const AttentionStep& a, Feed<STAGES>& feed) {
  using T = __nv_bfloat16;
  AttentionShare share(a);
  int h = share.h, lane = share.lane, channel = h * kHeadDim + lane * 8, parts = a.parts;
#pragma unroll 1
  for (int item = share.first; item < share.items; item += share.stride) {
    WindowPart<T> part = AttentionShare::part_of(a, item);
    int b = item / parts, i = item % parts, kept = part.kept();
    HeadSum sum(static_cast<const T*>(a.q.data) + b * a.q.stride + channel, a.scale);
#pragma unroll 1
    for (int n = 0; n < part.count;) {
      uint4 w[2 * kKeysTogether];
      bool stored = n < kept;
      if (stored) {
        feed.take(w);
        feed.template take<1>(w + 4);
      } else {
        // the token itself
#pragma unroll
        for (int j = 0; j < kKeysTogether; ++j) {
          w[2 * j] = *reinterpret_cast<const uint4*>(part.k + lane * 8);
          w[2 * j + 1] = *reinterpret_cast<const uint4*>(part.v + share.channel_of_values(a));
        }
      }
      auto widen = [&](const uint4& piece, float* out) {
        widen_eight(reinterpret_cast<const Eight<T>&>(piece), out);
      };
      int present = stored ? kept - n : 1;
      // a weight of zero times an infinite value would be NaN
#pragma unroll
      for (int j = 1; j < kKeysTogether; ++j)
        if (j >= present) w[2 * j + 1] = uint4{};
      sum.template add<kKeysTogether>(
          present, [&](int j, float* out) { widen(w[2 * j], out); }, [](int) { return 1.0f; },
          [&](int j, float* out) { widen(w[2 * j + 1], out); });
      if (stored) feed.send(kKeysTogether / kKeysOfUnit);
      n = !stored ? n + 1 : n + kKeysTogether < kept ? n + kKeysTogether : kept;
    }
    sum.template add_lanes<kKeysTogether>();
    sum.keep(PartResult(a, parts, i, b, h));
    if (i + 1 < parts) continue;
    // the token itself is the last key of the last part; no part reads the row it overwrites
    auto* row = reinterpret_cast<uint4*>(part.newest());
    if (h == 0) row[lane] = reinterpret_cast<const uint4*>(part.k)[lane];
    if (h < a.value_heads)
      row[kHeadLanes + channel / 8] = reinterpret_cast<const uint4*>(part.v)[channel / 8];
  }
}

// Join the parts of the window: a block takes kJoinedChannels channels of a head, a thread every
// 32nd part of one channel.
__device__ inline void join_phase(const AttentionStep& a, const PersistentShared& shared) {
  constexpr int kRows = kPersistentThreads / kJoinedChannels, kTogether = kMostJoined / kRows;
  // a column of sums has no bank conflicts
  constexpr int kStride = kJoinedChannels + 1;
  static_assert(kRows == kWarp && kJoinedChannels == kPersistentWarps);
  float *sums = shared.floats, *tops = sums + kRows * kStride, *totals = tops + kRows;
  int heads = static_cast<int>(a.heads), slices = static_cast<int>(a.value_dim) / kJoinedChannels;
  int row = threadIdx.x / kJoinedChannels, column = threadIdx.x % kJoinedChannels;
  int parts = static_cast<int>(a.parts), items = static_cast<int>(a.batch) * heads * slices;
#pragma unroll 1
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    int b = item / slices / heads, h = item / slices % heads;
    int channel = item % slices * kJoinedChannels + column;
    float tops_of[kTogether], totals_of[kTogether], values[kTogether], top = -INFINITY;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      bool there = row + j * kRows < parts;
      PartResult part(a, parts, there ? row + j * kRows : 0, b, h);
      tops_of[j] = there ? part.weights[0] : -INFINITY, totals_of[j] = part.weights[1];
      values[j] = there ? part.values[channel] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) top = fmaxf(top, tops_of[j]);
    // if none of the thread's parts has keys, weights are 0 relative to any finite base
    float base = top == -INFINITY ? 0.0f : top, total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      float weight = exp2f(tops_of[j] - base);
      total += weight * totals_of[j], sum += weight * values[j];
    }
    sums[row * kStride + column] = sum;
    if (column == 0) tops[row] = top, totals[row] = total;
    __syncthreads();
    // a warp joins a channel
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float highest = warp_max(tops[lane]), weight = exp2f(tops[lane] - highest);
    total = warp_sum(weight * totals[lane]), sum = warp_sum(weight * sums[lane * kStride + warp]);
    if (lane == 0)
      set_element(a.o, b, h * a.value_dim + item % slices * kJoinedChannels + warp, sum / total);
    __syncthreads();
  }
}

// Prefetch the vectors of the block, for which the phases would wait one after the other: one lane
// of the first warp takes each vector, and the thread blocks take its pieces in turn.
__device__ inline void warm_vectors(const BlockStep& a) {
  constexpr int64_t kPiece = 1024;
  const StepLinear& expand = a.steps[BlockStep::kExpand];
  const ConvStep& conv = expand.conv;
  const MixerStep& mixer = a.mixer;
  auto warm = [&](int lane, const void* data, int64_t bytes) {
    if (threadIdx.x != static_cast<unsigned>(lane) || reinterpret_cast<uintptr_t>(data) % 16 != 0) return;
    for (int64_t i = blockIdx.x * kPiece; i < bytes; i += gridDim.x * kPiece) {
      int64_t size = (bytes - i < kPiece ? bytes - i : kPiece) / 16 * 16;
      if (size > 0) prefetch(static_cast<const char*>(data) + i, static_cast<uint32_t>(size));
    }
  };
  auto warm_rows = [&](int lane, const Rows& x, int64_t rows, int64_t columns) {
    int64_t size = x.type == Type::kFloat32 ? 4 : 2;
    if (x) warm(lane, x.data, ((rows - 1) * x.stride + columns) * size);
  };
  warm(0, conv.state, conv.rows * conv.channels * conv.width * 2);
  warm_rows(1, conv.weight, conv.channels, conv.width);
  warm_rows(2, conv.bias, 1, conv.channels);
  warm_rows(3, mixer.gate_weight, mixer.value_dim, mixer.gate_dim);
  warm_rows(4, mixer.gate_bias, 1, mixer.value_dim);
  warm_rows(5, mixer.residual_weight, 1, mixer.value_dim);
  warm_rows(6, mixer.norm_weight, 1, mixer.value_dim);
  for (int step = 0; step < a.count; ++step)
    warm_rows(7 + step, a.steps[step].scaled_weight, 1, a.steps[step].layers[0].outputs);
}

// The same for the tiles that this thread block multiplies first in the next launch: the memory has
// little to do after the last layer's weights and while a launch begins.
__device__ inline void warm_next(const BlockStep& a) {
  constexpr unsigned kTiles = 2;
  const StepLinear& step = a.steps[BlockStep::kExpand];
  const auto* weight = static_cast<const __nv_bfloat16*>(a.next.data);
  if (weight == nullptr || threadIdx.x >= kTiles * kTile) return;
  // one thread per row
  int64_t tile = blockIdx.x + threadIdx.x / kTile * gridDim.x, row = tile * kTile + threadIdx.x % kTile;
  if (row < step.layers[0].outputs)
    prefetch(weight + row * a.next.stride, static_cast<uint32_t>(step.inputs * sizeof(*weight)));
}

// Grid: one block per multiprocessor, cooperative. Dynamic shared memory: persistent_shared.
template <int STAGES, int KEYS>
__global__ void __launch_bounds__(kPersistentThreads, 1)
    persistent_kernel(const __grid_constant__ BlockStep a) {
  RODIMUS_DYNAMIC_SHARED(uint4, stages);
  PersistentShared shared;
  shared.floats = reinterpret_cast<float*>(stages + STAGES * (kStageBytes / sizeof(uint4)));
  shared.squares = shared.floats + kSumFloats;
  shared.x = reinterpret_cast<__nv_bfloat16*>(shared.floats + kPersistentFloats);
  warm_vectors(a);
  Feed<STAGES> feed(a, stages);
  const StepLinear& first = a.steps[BlockStep::kExpand];
  if (first.rows == 1)
    stage_scaled<kPersistentWarps, 1>(first, first.layers[0].x, shared.x, shared.squares);
  else
    stage_scaled<kPersistentWarps, 4>(first, first.layers[0].x, shared.x, shared.squares);
  feed.fill();
#pragma unroll 1
  for (int step = 0;;) {
    if (step + 1 == a.count) warm_next(a);
    linear_phase(a, step, feed, shared);
    if (step + 1 == a.count) return;
    auto arrival = arrive_at_grid();
    if (step == BlockStep::kProject) {
      MixerPhase<KEYS> mixer(a.mixer);
      wait_for_grid(arrival);
      mixer.run(a.mixer, shared);
      arrival = arrive_at_grid();
    } else if (step == BlockStep::kAttend) {
      wait_for_grid(arrival);
      attention_phase(a.attention, feed);
      arrival = arrive_at_grid();
      wait_for_grid(arrival);
      join_phase(a.attention, shared);
      arrival = arrive_at_grid();
    }
    wait_for_grid(arrival);
    ++step;
  }
}

}  // namespace rodimus
