// Arguments of the kernels of a block step: its weights and states as linear steps, the mixer's
// state update and attention. Operations between linear layers are part of the linear steps. No
// torch here.
#pragma once

#include <math.h>

#include <initializer_list>

#include "../workspace.h"
#include "kernels.h"

namespace rodimus {

// Weights with their sizes, which are used for matrices only.
struct Weights {
  Rows rows[kCount];
  int64_t outputs[kCount] = {}, inputs[kCount] = {};
};

struct BlockGiven {
  Weights weights;
  Rows stream, sum;  // [batch, width], read and written; they may be the same
  void* taps;
  float* state;
  int64_t batch, width;
  float key_eps, norm_eps;
  bool attends = false;
  Window window = {};
};

// How a block is cut: for one kernel per part (processors = 0), or one on all multiprocessors.
struct Cut {
  int64_t processors = 0;

  int64_t mixer_columns(int64_t rows) const { return processors ? kPersistentColumns : step_columns(rows); }
  int64_t parts(const AttentionStep& a) const {
    if (!processors) return attention_parts(a);
    int64_t parts = processors * (kPersistentThreads / (a.heads * kHeadLanes)) / a.batch;
    for (int64_t most : {a.window / kLeastPart, static_cast<int64_t>(kMostJoined)})
      parts = parts < most ? parts : most;
    // at least two, because the single kernel always joins parts
    return parts > 2 ? parts : 2;
  }

 private:
  // Fewest keys that are worth a part.
  static constexpr int64_t kLeastPart = 4;
};

// Puts a block into `step`, whose intermediate results are in `work`.
class BlockPlan {
 public:
  BlockPlan(const BlockGiven& given, const Cut& cut, Workspace work, BlockStep& step)
      : given_(given), w_(given.weights), cut_(cut), work_(work), step_(step) {
    Stream start{given_.stream};
    StepLinear branch = mixer(start);
    if (given_.attends) {
      start = add(branch, start, given_.sum, kAttnNorm);
      // only the MLP reads the sum with the attention's output
      Stream inside = add(attention(start), start, work_.rows(given_.width, given_.sum.type), kFfnNorm);
      branch = mlp(inside);
    }
    add(branch, start, given_.sum);
  }

  // Floats that the intermediate results take, with padding of a line for each of them.
  static int64_t floats(const BlockGiven& given, const Cut& cut) {
    const Weights& w = given.weights;
    int64_t inner = w.outputs[kGateOut], gates = w.outputs[kMemGate];
    int64_t columns = 6 * inner + 2 * gates + w.outputs[kGateIn] + given.width, scratch = 0;
    if (given.attends) {
      columns += 2 * w.outputs[kQuery] + w.outputs[kKey] + w.outputs[kValue] + 4 * given.width +
                 w.outputs[kFfnIn];
      AttentionStep a = attention_sizes(given);
      scratch = attention_parts_scratch(a, cut.parts(a));
    }
    return given.batch * columns + scratch + Workspace::padding(32);
  }

 private:
  // The residual stream and, for the norm that follows, what the step that wrote it has stored: its
  // product with the norm's weight, and sums of squares.
  struct Stream {
    Rows rows, scaled;
    float* squares = nullptr;
    int64_t parts = 0;
  };

  void keep(const StepLinear& a) {
    int i = step_.count++;
    step_.steps[i] = a, step_.tiles[i] = static_cast<int>(all_tiles(a));
    if (i > 0) step_.before[i] = step_.before[i - 1] + step_.tiles[i - 1];
  }

  StepLinear::Layer layer(const Rows& x, int which, const Rows& y = {}, const Rows& bias = {}) const {
    return {x, w_.rows[which], bias, y, w_.outputs[which]};
  }

  // A step with one layer, or with the first of several.
  StepLinear step(const StepLinear::Layer& first, int which) const {
    StepLinear a;
    a.layers[0] = first;
    a.rows = given_.batch, a.inputs = w_.inputs[which], a.eps = given_.norm_eps;
    a.start = Start::kAhead;
    return a;
  }

  // Put the norm of a stream before a step that reads the stream.
  void norm(StepLinear& a, const Stream& stream) const {
    for (StepLinear::Layer& layer : a.layers) layer.x = stream.scaled;
    a.squares = stream.squares, a.squares_stride = a.parts = stream.parts;
  }

  // sum = residual + branch, and what the norm with the weight norm_weight needs; -1 for no norm.
  Stream add(StepLinear a, const Stream& residual, const Rows& sum, int norm_weight = -1) {
    a.residual = residual.rows, a.sum = sum;
    Stream result{sum};
    if (norm_weight >= 0) {
      result.parts = step_linear_tiles(a, 0);
      a.sum_squares = result.squares = work_.floats(given_.batch * result.parts);
      a.scaled = result.scaled = work_.rows(given_.width), a.scaled_weight = w_.rows[norm_weight];
    }
    keep(a);
    return result;
  }

  StepLinear mixer(const Stream& stream) {
    int64_t inner = w_.outputs[kGateOut], keys = w_.outputs[kMemGate] / 2, rank = w_.outputs[kGateIn];
    Rows expanded = work_.rows(2 * inner), shifted = work_.rows(inner);
    StepLinear expand = step(layer(stream.rows, kFc, expanded), kFc);
    expand.norm_weight = w_.rows[kMixerNorm];
    expand.start = Start::kUnder;
    ConvStep& conv = expand.conv;
    conv.x = expanded, conv.y = shifted, conv.weight = w_.rows[kConv], conv.bias = w_.rows[kConvBias];
    conv.state = given_.taps;
    conv.rows = given_.batch, conv.channels = inner, conv.width = w_.inputs[kConv];
    keep(expand);

    Rows query_key = work_.rows(2 * keys), gates = work_.rows(2 * keys, Type::kFloat32);
    Rows hidden = work_.rows(rank);
    StepLinear project = step(layer(shifted, kQueryKey, query_key), kQueryKey);
    // the gates' bias is added in float32: decays near 1 do not survive bfloat16
    project.layers[1] = layer(shifted, kMemGate, gates, w_.rows[kMemBias]);
    project.layers[2] = layer(expanded, kGateIn, hidden);
    project.count = 3;
    keep(project);

    MixerStep a;
    a.q = query_key, a.k = columns(query_key, keys);
    a.select = gates, a.temper = columns(gates, keys);
    a.gate_hidden = hidden, a.x = expanded, a.shifted = shifted;
    a.gate = columns(expanded, inner);
    a.gate_weight = w_.rows[kGateOut], a.gate_bias = w_.rows[kGateBias];
    a.residual_weight = w_.rows[kResidual], a.norm_weight = w_.rows[kActNorm];
    a.state = given_.state;
    a.rows = given_.batch, a.key_dim = keys, a.value_dim = inner, a.gate_dim = rank;
    a.scale = 1.0f / sqrtf(static_cast<float>(keys));
    a.key_eps = given_.key_eps, a.norm_eps = given_.norm_eps;
    int64_t columns = cut_.mixer_columns(a.rows), floats = mixer_scratch(a, columns);
    a.scratch = work_.floats(floats);
    a.start = Start::kAhead;
    // the next step applies the norm's factor after its product
    a.scaled = work_.rows(inner);
    step_.mixer = a;

    StepLinear contract = step(layer(a.scaled, kMixerOut), kMixerOut);
    contract.squares = a.scratch + mixer_values(inner), contract.squares_stride = floats / a.rows;
    contract.parts = (inner + columns - 1) / columns;
    return contract;
  }

  static AttentionStep attention_sizes(const BlockGiven& given) {
    const Weights& w = given.weights;
    int64_t dim = given.window.head_dim;
    AttentionStep a = {};
    a.batch = given.batch, a.steps = 1, a.ring = given.window.rows, a.window = given.window.size;
    a.heads = w.outputs[kQuery] / dim, a.key_heads = w.outputs[kKey] / dim;
    a.value_heads = w.outputs[kValue] / dim, a.key_dim = a.value_dim = dim;
    return a;
  }

  StepLinear attention(const Stream& stream) {
    const Window& window = given_.window;
    AttentionStep a = attention_sizes(given_);
    a.q = work_.rows(w_.outputs[kQuery]), a.k = work_.rows(w_.outputs[kKey]);
    a.v = work_.rows(w_.outputs[kValue]), a.o = work_.rows(w_.outputs[kQuery]);
    StepLinear project = step(layer(stream.rows, kQuery, a.q), kQuery);
    project.layers[1] = layer(stream.rows, kKey, a.k);
    project.layers[2] = layer(stream.rows, kValue, a.v);
    project.count = 3;
    norm(project, stream);
    if (window.half) {
      project.cos = window.cos, project.sin = window.sin;
      project.rotated = 2, project.head_dim = window.head_dim, project.half = window.half;
    }
    keep(project);

    a.cache = window.ring.rows, a.int8_values = window.ring.int8_values;
    a.position = window.position;
    a.scale = 1.0f / sqrtf(static_cast<float>(window.head_dim));
    a.parts = cut_.parts(a);
    a.scratch = work_.floats(attention_parts_scratch(a, a.parts));
    // all rows of the ring but the newest were written in the steps of earlier tokens
    a.start = Start::kAhead;
    step_.attention = a;
    return step(layer(a.o, kAttnOut), kAttnOut);
  }

  StepLinear mlp(const Stream& stream) {
    int64_t inner = w_.outputs[kFfnIn] / 2;
    Rows gated = work_.rows(inner);
    StepLinear expand = step(layer(stream.rows, kFfnIn, gated), kFfnIn);
    expand.gated = true;
    norm(expand, stream);
    keep(expand);
    return step(layer(gated, kFfnOut), kFfnOut);
  }

  const BlockGiven& given_;
  const Weights& w_;
  const Cut& cut_;
  Workspace work_;
  BlockStep& step_;
};

}  // namespace rodimus
