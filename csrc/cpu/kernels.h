// The CPU kernels as a table of functions, compiled once per instruction set and chosen at run time.
//
// A kernel works on a range of tasks, so that the caller splits the work over torch's threads. The
// number of tasks of an operator is the same for every instruction set and is given here.
#pragma once

#include "../arguments.h"

namespace rodimus {

// Columns of the state that a task updates: 1 KiB of each row, so all operands stay in L1.
constexpr int64_t kBlock = 256;
// Tokens of a sequence that a task convolves.
constexpr int64_t kConvTokens = 64;
// Keys a task scores before it reads their values.
constexpr int64_t kKeyBlock = 16;

constexpr int64_t blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }

struct Kernels {
  const char* name;
  // Tasks: rows * blocks(value_dim).
  void (*ddts_step)(const DdtsStep&, int64_t begin, int64_t end);
  // Tasks: rows; then rows * blocks(value_dim); then rows. Scratch: mixer_scratch floats.
  void (*mixer_gates)(const MixerStep&, int64_t begin, int64_t end);
  void (*mixer_step)(const MixerStep&, int64_t begin, int64_t end);
  void (*mixer_norm)(const MixerStep&, int64_t begin, int64_t end);
  // Tasks: rows * blocks(channels).
  void (*conv_step)(const ConvStep&, int64_t begin, int64_t end);
  // Tasks: conv_tasks.
  void (*conv)(const Conv&, int64_t begin, int64_t end);
  // Once, before the rest; then tasks: outputs. Scratch: linear_scratch floats.
  void (*linear_prepare)(const Linear&);
  void (*linear)(const Linear&, int64_t begin, int64_t end);
  // Tasks: rows.
  void (*norm)(const Norm&, int64_t begin, int64_t end);
  // Tasks: rows.
  void (*rope)(const Rope&, int64_t begin, int64_t end);
  // Tasks: rows * blocks(dim). a + b, and a * silu(b).
  void (*add)(const Pairwise&, int64_t begin, int64_t end);
  void (*gate)(const Pairwise&, int64_t begin, int64_t end);
  // Tasks: batch, batch * splits, batch * steps * heads. Scratch: attention_scratch floats.
  void (*attention_write)(const AttentionStep&, int64_t begin, int64_t end);
  void (*attention_scan)(const AttentionStep&, int64_t splits, int64_t begin, int64_t end);
  void (*attention_merge)(const AttentionStep&, int64_t splits, int64_t begin, int64_t end);
};

constexpr int64_t conv_runs(int64_t length) { return (length + kConvTokens - 1) / kConvTokens; }
inline int64_t conv_tasks(const Conv& a) { return a.batch * conv_runs(a.length) * blocks(a.channels); }

// Per row: q, k and decay, the gated output before its norm, one sum of squares per block.
inline int64_t mixer_scratch(const MixerStep& a) {
  return a.rows * (3 * a.key_dim + a.value_dim + blocks(a.value_dim));
}

// Numbers that a row of `inputs` takes in whole vectors of every instruction set.
constexpr int64_t whole_vectors(int64_t inputs) { return (inputs + 31) / 32 * 32; }

// Size of a row of x as the kernels read it, in numbers of four bytes: padded to a multiple of
// kInt4Unit, then a line that holds the row's unit (see Operand) if weights are quantised.
constexpr int64_t prepared_numbers(int64_t inputs) {
  return (inputs + kInt4Unit - 1) / kInt4Unit * kInt4Unit;
}
constexpr int64_t prepared_row(int64_t inputs) { return prepared_numbers(inputs) + 16; }
inline int64_t linear_scratch(const Linear& a) { return a.rows * prepared_row(a.inputs); }

// Heads whose softmax weights are kept at a time.
constexpr int64_t kHeads = 32;

// Floats that one part of a window stores for a token: largest score and sum of weights of each
// head, and the weighted values, which start on a line of their own.
inline int64_t part_size(int64_t heads, int64_t value_dim) {
  return 2 * whole_vectors(heads) + heads * whole_vectors(value_dim);
}

// A part for each sequence, split and token.
inline int64_t attention_scratch(const AttentionStep& a, int64_t splits) {
  return a.batch * splits * a.steps * part_size(a.heads, a.value_dim);
}

// The table of the instruction set in use: the best this processor has, unless another was chosen.
const Kernels& kernels();

}  // namespace rodimus
