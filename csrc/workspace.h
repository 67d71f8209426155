// Memory of the intermediate results of a block step, for CPU and CUDA. No torch here.
#pragma once

#include <stdexcept>

#include "arguments.h"

namespace rodimus {

inline Rows columns(const Rows& x, int64_t first) {
  Rows part = x;
  int64_t size = x.type == Type::kFloat32 ? 4 : 2;
  part.data = static_cast<char*>(x.data) + first * size;
  return part;
}

// Intermediate results of a block, carved out of memory that all blocks use one after the other;
// each result starts on a line.
class Workspace {
 public:
  // Rows have `type`, that of the activations, unless rows() is given another.
  Workspace(float* memory, int64_t floats, int64_t rows, Type type)
      : rows_(rows), type_(type), next_(memory), end_(memory + floats) {}

  Rows rows(int64_t columns) { return rows(columns, type_); }
  Rows rows(int64_t columns, Type type) { return {floats(rows_ * columns), type, columns}; }

  float* floats(int64_t count) {
    float* here = next_;
    next_ += (count + kLine - 1) / kLine * kLine;
    if (next_ > end_) throw std::length_error("the workspace of a block step is too small");
    return here;
  }

  // Most floats that `results` intermediate results take beyond their own numbers.
  static constexpr int64_t padding(int64_t results) { return results * kLine; }

 private:
  static constexpr int64_t kLine = 32;
  int64_t rows_;
  Type type_;
  float *next_, *end_;
};

}  // namespace rodimus
