// Sizes that the kernels and their launches agree on: plain C++.
#pragma once

#include "../arguments.h"

namespace rodimus {

// Floats of a row of a mixer step's scratch memory: the values, then a sum of squares a block. Rows
// and sums start on 16 bytes.
RODIMUS_EVERYWHERE inline int64_t mixer_values(int64_t values) { return (values + 3) / 4 * 4; }
RODIMUS_EVERYWHERE inline int64_t mixer_row(int64_t values, int64_t parts) {
  return mixer_values(values) + (parts + 3) / 4 * 4;
}

// A block of a linear step makes 16 outputs, of one layer, and takes the inputs in units of 64.
constexpr int kTile = 16, kHalfTile = kTile / 2, kUnit = 64;

RODIMUS_EVERYWHERE inline int64_t step_linear_tiles(const StepLinear& a, int64_t layer) {
  int64_t outputs = a.layers[layer].outputs;
  return a.gated ? (outputs / 2 + kHalfTile - 1) / kHalfTile : (outputs + kTile - 1) / kTile;
}

// Elements between the rows of x in shared memory: eight rows of 16-byte pieces meet no bank twice.
RODIMUS_EVERYWHERE inline int64_t staged_stride(int64_t inputs) {
  return (inputs + kUnit - 1) / kUnit * kUnit + kUnit / 2;
}

RODIMUS_EVERYWHERE inline int64_t staged_bytes(const StepLinear& a) {
  return a.rows * staged_stride(a.inputs) * 2;
}

}  // namespace rodimus
