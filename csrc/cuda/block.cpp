// One token through the blocks of the model: ten kernels each, with what stands between the linear
// layers at their ends. For up to eight rows of bfloat16 weights; torch's own products take more.
#include "../block.h"
#include "launch.h"

namespace rodimus {
namespace {

// The residual stream, and for the norm that follows what whoever wrote it has left: its product
// with the weight, and sums of squares.
struct Stream {
  Rows rows, scaled;
  float* squares = nullptr;
  int64_t parts = 0;
};

struct Block {
  const std::vector<Tensor>& weights;
  const Tensor& like;
  int64_t batch, width;
  float key_eps, norm_eps;
  Workspace work;
  cudaStream_t queue;

  Rows weight(int which) const { return rows_of("weight", weights[which], like); }
  int64_t outputs(int which) const { return weights[which].size(0); }

  StepLinear::Layer layer(const Rows& x, int which, const Rows& y = {}, const Rows& bias = {}) const {
    return {x, weight(which), bias, y, outputs(which)};
  }

  // A step of one layer or of the first of several.
  StepLinear step(const StepLinear::Layer& first, int which) const {
    StepLinear a;
    a.layers[0] = first;
    a.rows = batch, a.inputs = weights[which].size(1), a.eps = norm_eps;
    a.start = Start::kAhead;
    return a;
  }

  // The norm of a stream before a step of it.
  void norm(StepLinear& a, const Stream& stream) const {
    for (StepLinear::Layer& layer : a.layers) layer.x = stream.scaled;
    a.squares = stream.squares, a.squares_stride = a.parts = stream.parts;
  }

  void run(const StepLinear& a) const {
    STD_TORCH_CHECK(fits_step_linear(a), "blocks_step(impl='native') on CUDA takes bfloat16 weights"
                    " whose rows start on 16 bytes and hold whole ones; got ", a.inputs,
                    " inputs and ", a.layers[0].outputs, " outputs");
    launch_step_linear(a, queue);
  }

  // residual + branch, and what the norm of that weight takes from it; -1 for no norm.
  Stream add(StepLinear a, const Stream& residual, const Rows& sum, int norm_weight = -1) {
    a.residual = residual.rows, a.sum = sum;
    Stream result{sum};
    if (norm_weight >= 0) {
      result.parts = step_linear_tiles(a, 0);
      a.sum_squares = result.squares = work.floats(batch * result.parts);
      a.scaled = result.scaled = work.rows(width), a.scaled_weight = weight(norm_weight);
    }
    run(a);
    return result;
  }

  StepLinear mixer(const Stream& stream, const Tensor& taps, const Tensor& state) {
    int64_t inner = outputs(kGateOut), keys = outputs(kMemGate) / 2, rank = outputs(kGateIn);
    Rows expanded = work.rows(2 * inner), shifted = work.rows(inner);
    StepLinear expand = step(layer(stream.rows, kFc, expanded), kFc);
    expand.norm_weight = weight(kMixerNorm);
    expand.start = Start::kUnder;
    ConvStep& conv = expand.conv;
    conv.x = expanded, conv.y = shifted, conv.weight = weight(kConv), conv.bias = weight(kConvBias);
    conv.state = taps.data_ptr();
    conv.rows = batch, conv.channels = inner, conv.width = weights[kConv].size(1);
    run(expand);

    Rows query_key = work.rows(2 * keys), gates = work.rows(2 * keys, Type::kFloat32);
    Rows hidden = work.rows(rank);
    StepLinear project = step(layer(shifted, kQueryKey, query_key), kQueryKey);
    // the gates' bias is added in float32: decays near 1 do not survive bfloat16
    project.layers[1] = layer(shifted, kMemGate, gates, weight(kMemBias));
    project.layers[2] = layer(expanded, kGateIn, hidden);
    project.count = 3;
    run(project);

    MixerStep a;
    a.q = query_key, a.k = columns(query_key, keys);
    a.select = gates, a.temper = columns(gates, keys);
    a.gate_hidden = hidden, a.x = expanded, a.shifted = shifted;
    a.gate = columns(expanded, inner);
    a.gate_weight = weight(kGateOut), a.gate_bias = weight(kGateBias);
    a.residual_weight = weight(kResidual), a.norm_weight = weight(kActNorm);
    a.state = static_cast<float*>(state.data_ptr());
    a.rows = batch, a.key_dim = keys, a.value_dim = inner, a.gate_dim = rank;
    a.scale = 1.0f / sqrtf(static_cast<float>(keys));
    a.key_eps = key_eps, a.norm_eps = norm_eps;
    a.scratch = work.floats(mixer_scratch(a));
    a.start = Start::kAhead;
    // its norm's factor is the next product's
    a.scaled = work.rows(inner);
    launch_mixer_state(a, queue);

    int64_t row = mixer_scratch(a) / batch, columns = step_columns(batch);
    StepLinear contract = step(layer(a.scaled, kMixerOut), kMixerOut);
    contract.squares = a.scratch + mixer_values(inner), contract.squares_stride = row;
    contract.parts = (inner + columns - 1) / columns;
    return contract;
  }

  StepLinear attention(const Stream& stream, const Window& window) {
    int64_t head_dim = window.head_dim;
    AttentionStep a;
    a.q = work.rows(outputs(kQuery)), a.k = work.rows(outputs(kKey));
    a.v = work.rows(outputs(kValue)), a.o = work.rows(outputs(kQuery));
    StepLinear project = step(layer(stream.rows, kQuery, a.q), kQuery);
    project.layers[1] = layer(stream.rows, kKey, a.k);
    project.layers[2] = layer(stream.rows, kValue, a.v);
    project.count = 3;
    norm(project, stream);
    if (window.half) {
      STD_TORCH_CHECK(window.half % kHalfTile == 0 && head_dim % kTile == 0,
                      "rotary tables of a multiple of ", kHalfTile, " and heads of a multiple of ",
                      kTile, " are expected, got ", window.half, " and ", head_dim);
      project.cos = window.cos, project.sin = window.sin;
      project.rotated = 2, project.head_dim = head_dim, project.half = window.half;
    }
    run(project);

    a.cache = window.ring.rows, a.int8_values = window.ring.int8_values;
    a.position = window.position;
    a.batch = batch, a.steps = 1, a.ring = window.rows, a.window = window.size;
    a.heads = outputs(kQuery) / head_dim, a.key_heads = outputs(kKey) / head_dim;
    a.value_heads = outputs(kValue) / head_dim, a.key_dim = a.value_dim = head_dim;
    a.scale = 1.0f / sqrtf(static_cast<float>(head_dim));
    a.scratch = work.floats(attention_scratch(a));
    // the ring but for its newest row is as old as the token before
    a.start = Start::kAhead;
    launch_attention_step(a, queue);
    return step(layer(a.o, kAttnOut), kAttnOut);
  }

  StepLinear mlp(const Stream& stream) {
    int64_t inner = outputs(kFfnIn) / 2;
    Rows gated = work.rows(inner);
    StepLinear expand = step(layer(stream.rows, kFfnIn, gated), kFfnIn);
    expand.gated = true;
    norm(expand, stream);
    run(expand);
    return step(layer(gated, kFfnOut), kFfnOut);
  }
};

// Numbers that the intermediate results take, with room for a line beside each of them.
int64_t workspace_size(const std::vector<Tensor>& w, int64_t batch, int64_t width) {
  int64_t inner = w[kGateOut].size(0), gates = w[kMemGate].size(0);
  int64_t columns = 6 * inner + 2 * gates + w[kGateIn].size(0) + 2 * width;
  if (w.size() == kCount)
    columns += 2 * w[kQuery].size(0) + w[kKey].size(0) + w[kValue].size(0) + 4 * width +
               w[kFfnIn].size(0);
  return batch * columns + Workspace::padding(32);
}

Tensor blocks_step(const Tensor& stream, const std::vector<Tensor>& weights,
                   const std::vector<Tensor>& taps, const std::vector<Tensor>& states,
                   const std::vector<Tensor>& rings, const OptionalTensor& position,
                   const OptionalTensor& cos, const OptionalTensor& sin, int64_t window_size,
                   int64_t head_dim, double key_eps, double norm_eps) {
  std::vector<BlockArguments> blocks = block_arguments(
      stream, weights, taps, states, rings, position, cos, sin, window_size, head_dim);
  int64_t batch = stream.size(0), width = stream.size(1), floats = 0;
  for (const BlockArguments& given : blocks) {
    const std::vector<Tensor>& w = given.weights;
    check_keys(w[kMemGate].size(0) / 2);
    int64_t needed = workspace_size(w, batch, width);
    if (given.window) {
      AttentionStep a;
      a.batch = batch, a.steps = 1, a.ring = given.window->rows, a.window = window_size;
      a.heads = w[kQuery].size(0) / head_dim, a.key_heads = w[kKey].size(0) / head_dim;
      a.value_heads = w[kValue].size(0) / head_dim, a.key_dim = a.value_dim = head_dim;
      needed += attention_scratch(a);
    }
    floats = std::max(floats, needed);
  }
  Tensor result = output_like(stream, {batch, width}, stream.scalar_type());
  on_stream(stream, [&](cudaStream_t queue) {
    Tensor memory = output_like(stream, {floats}, ScalarType::Float);
    Stream start{rows_of("stream", stream, stream)};
    Rows last = output_rows(result);
    size_t left = blocks.size();
    for (const BlockArguments& given : blocks) {
      // no kernel writes before the one ahead of it has ended, so all blocks may share the memory
      Block block{given.weights, stream, batch, width, static_cast<float>(key_eps),
                  static_cast<float>(norm_eps), Workspace(memory, batch, Type::kBFloat16), queue};
      // at the same place for all blocks, of which none writes the stream that it reads
      Rows between = block.work.rows(width, last.type), sum = left-- % 2 ? last : between;
      StepLinear branch = block.mixer(start, given.taps, given.state);
      if (given.window) {
        start = block.add(branch, start, sum, kAttnNorm);
        // the sum with what was attended reaches the MLP alone
        Stream inside = block.add(block.attention(start, *given.window), start,
                                  block.work.rows(width, sum.type), kFfnNorm);
        branch = block.mlp(inside);
      }
      start = block.add(branch, start, sum);
    }
  });
  return result;
}

}  // namespace
}  // namespace rodimus

STABLE_TORCH_LIBRARY_IMPL(rodimus, CUDA, m) {
  m.impl("native_blocks_step", TORCH_BOX(&rodimus::blocks_step));
}
