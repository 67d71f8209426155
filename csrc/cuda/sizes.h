// Sizes that the kernels and their launches agree on: plain C++.
#pragma once

#include "../arguments.h"

namespace rodimus {

// Floats of a row of a mixer step's scratch memory: the values, then a sum of squares per block.
// Rows and sums start on 16 bytes.
RODIMUS_EVERYWHERE inline int64_t mixer_values(int64_t values) { return (values + 3) / 4 * 4; }
RODIMUS_EVERYWHERE inline int64_t mixer_row(int64_t values, int64_t parts) {
  return mixer_values(values) + (parts + 3) / 4 * 4;
}

// Channels of a key and of a value head in the kernels for one key head, and lanes that hold a
// query head: half a warp.
constexpr int kHeadDim = 128, kHeadLanes = 16;

// A block of a linear step computes 16 outputs of one layer, and takes the inputs in units of 64.
constexpr int kTile = 16, kHalfTile = kTile / 2, kUnit = 64;

RODIMUS_EVERYWHERE inline int64_t step_linear_tiles(const StepLinear& a, int64_t layer) {
  int64_t outputs = a.layers[layer].outputs;
  return a.gated ? (outputs / 2 + kHalfTile - 1) / kHalfTile : (outputs + kTile - 1) / kTile;
}

// Elements between rows of x in shared memory: 16-byte pieces of eight rows do not share a bank.
RODIMUS_EVERYWHERE inline int64_t staged_stride(int64_t inputs) {
  return (inputs + kUnit - 1) / kUnit * kUnit + kUnit / 2;
}

inline int64_t all_tiles(const StepLinear& a) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < a.count; ++i) tiles += step_linear_tiles(a, i);
  return tiles;
}

// Shared memory of a block: what every GPU of compute capability 8.0 and above gives to a kernel
// that asks for it (8.6, 8.9 and 12.0 have the least), and what a kernel gets without asking.
constexpr int64_t kMostShared = 99 * 1024, kUnaskedShared = 48 * 1024;

// Floats per warp of a linear step besides x: its sums of a tile, and squares of the rows.
constexpr int kWarpSums = kTile * kMaxRows, kWarpSquares = kMaxRows;

// Which kernel a linear step uses, and the shared memory of its blocks: `fixed` bytes that the
// kernel declares and `staged` bytes for the rows of x.
struct StepLinearLaunch {
  int warps, depth, blocks, scaled;
  int64_t fixed, staged, together;

  // memory that the kernel declares counts as well
  bool asks() const { return fixed + staged > kUnaskedShared; }
  bool fits() const { return fixed + staged <= kMostShared; }
};

inline StepLinearLaunch step_linear_launch(const StepLinear& a, int64_t processors) {
  auto launch = [&](int warps, int depth, int blocks, int scaled) {
    int64_t fixed = 4 * warps * (kWarpSums + kWarpSquares);
    int64_t staged = a.rows * staged_stride(a.inputs) * 2, together = processors * blocks;
    return StepLinearLaunch{warps, depth, blocks, scaled, fixed, staged, together};
  };
  if (a.norm_weight) return launch(8, 2, 4, a.rows == 1 ? 1 : kMaxRows);
  // as many blocks at a time on a multiprocessor as it gets, with as many loads as it can hold
  int64_t each = (all_tiles(a) + processors - 1) / processors;
  if (each == 1 && a.inputs > 3 * 16 * kUnit) return launch(16, 4, 1, 0);
  if (each == 1) return launch(16, 2, 2, 0);
  return each == 2 ? launch(8, 4, 2, 0) : launch(8, 2, 4, 0);
}

// The kernel of a whole block of the model: threads of a thread block, its bytes in one stage of
// weights (one unit per warp), the numbers of stages it is compiled for, the most tiles that are
// finished together, and floats of shared memory besides weights and x: sums and squares, or what
// the phases between the layers use.
constexpr int kPersistentWarps = 16, kPersistentThreads = 32 * kPersistentWarps;
constexpr int64_t kStageBytes = int64_t{kTile} * kUnit * 2 * kPersistentWarps;
constexpr int kStageChoices[] = {6, 4, 2};
constexpr int kMostTiles = kPersistentThreads / (kHalfTile * kMaxRows);
constexpr int kSumFloats = 2 * kPersistentWarps * kWarpSums;
constexpr int64_t kPersistentFloats = kSumFloats + kPersistentWarps * kWarpSquares;

// Columns of a state that its thread blocks update at a time.
constexpr int kPersistentColumns = 32;

// Bytes of shared memory of its thread blocks.
inline int64_t persistent_shared(const BlockStep& a, int stages) {
  int64_t most = 0;
  for (int i = 0; i < a.count; ++i) most = a.steps[i].inputs > most ? a.steps[i].inputs : most;
  return stages * kStageBytes + kPersistentFloats * 4 + a.steps[0].rows * staged_stride(most) * 2;
}

// The most stages that fit, 0 if none do.
inline int persistent_stages(const BlockStep& a, int64_t shared) {
  for (int stages : kStageChoices)
    if (persistent_shared(a, stages) <= shared) return stages;
  return 0;
}

// Channels of an attention output that a thread block joins, and the most parts of a window.
constexpr int kJoinedChannels = 16, kMostJoined = 256;

}  // namespace rodimus
