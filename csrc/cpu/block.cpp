// One token through the blocks of the model: every projection and everything between them, in one
// call. A decode step has dozens of operators per block, each shorter than a call from Python.
#include "../block.h"
#include "kernels.h"
#include "threads.h"

namespace rodimus {
namespace {

struct Block {
  const BlockArguments& given;
  const std::vector<Tensor>& weights;
  const Tensor& stream;
  int64_t batch, width;
  double key_eps, norm_eps;
  Workspace work;
  Team& team;
  float* converted;  // scratch of the linear layers

  Rows weight(int which) const { return rows_of("weight", weights[which], stream); }
  Rows matrix(int which) const {
    return weight_of("matrix", weights[which], kAny, given.inputs[which], stream);
  }
  int64_t outputs(int which) const { return weights[which].size(0); }

  Linear linear(const Rows& x, int which, const Rows& y, const Rows& bias = {}) const {
    Linear a;
    a.x = x, a.weight = matrix(which), a.scale = given.scales[which];
    a.bias = bias, a.y = y, a.scratch = converted;
    a.rows = batch, a.inputs = given.inputs[which], a.outputs = outputs(which);
    return a;
  }

  // Layers with the same input, whose outputs are shared among the threads together.
  void run(const std::vector<Linear>& layers) const {
    int64_t total = 0;
    for (const Linear& layer : layers) total += layer.outputs;
    const Kernels& table = kernels();
    table.linear_prepare(layers[0]);
    team.run(total, rows_at_a_time(layers[0].inputs * batch), [&](int64_t begin, int64_t end) {
      int64_t first = 0;
      for (const Linear& layer : layers) {
        int64_t from = begin > first ? begin - first : 0;
        int64_t to = end - first < layer.outputs ? end - first : layer.outputs;
        if (from < to) table.linear(layer, from, to);
        first += layer.outputs;
      }
    });
  }

  void norm(const Rows& x, int which, const Rows& y, const Rows& residual = {},
            const Rows& sum = {}) const {
    Norm a;
    a.x = x, a.weight = weight(which), a.residual = residual, a.sum = sum, a.y = y;
    a.rows = batch, a.dim = width, a.eps = static_cast<float>(norm_eps);
    kernels().norm(a, 0, batch);
  }

  Rows mixer(const Rows& x, const Tensor& taps, const Tensor& state) {
    int64_t inner = outputs(kGateOut), keys = outputs(kMemGate) / 2, rank = outputs(kGateIn);
    const Kernels& table = kernels();
    Rows expanded = work.rows(2 * inner), shifted = work.rows(inner);
    run({linear(x, kFc, expanded)});

    ConvStep conv;
    conv.x = expanded, conv.y = shifted, conv.weight = weight(kConv), conv.bias = weight(kConvBias);
    conv.state = taps.data_ptr();
    conv.rows = batch, conv.channels = inner, conv.width = weights[kConv].size(1);
    team.run(batch * blocks(inner), grain(conv.width * kBlock),
             [&](int64_t begin, int64_t end) { table.conv_step(conv, begin, end); });

    Rows query_key = work.rows(2 * keys), gates = work.rows(2 * keys, Type::kFloat32);
    Rows hidden = work.rows(rank);
    // the gates' bias is added in float32: decays near 1 do not survive bfloat16
    run({linear(shifted, kQueryKey, query_key), linear(shifted, kMemGate, gates, weight(kMemBias))});
    run({linear(expanded, kGateIn, hidden)});

    MixerStep a;
    a.q = query_key, a.k = columns(query_key, keys);
    a.select = gates, a.temper = columns(gates, keys);
    a.gate_hidden = hidden, a.x = expanded, a.shifted = shifted;
    a.gate = columns(expanded, inner);
    a.gate_weight = matrix(kGateOut), a.gate_scale = given.scales[kGateOut];
    a.gate_bias = weight(kGateBias);
    a.residual_weight = weight(kResidual), a.norm_weight = weight(kActNorm);
    a.y = work.rows(inner);
    a.state = static_cast<float*>(state.data_ptr());
    a.rows = batch, a.key_dim = keys, a.value_dim = inner, a.gate_dim = rank;
    a.scale = 1.0f / sqrtf(static_cast<float>(keys));
    a.key_eps = static_cast<float>(key_eps), a.norm_eps = static_cast<float>(norm_eps);
    a.scratch = work.floats(mixer_scratch(a));
    table.mixer_gates(a, 0, batch);
    team.run(batch * blocks(inner), grain(keys * kBlock),
             [&](int64_t begin, int64_t end) { table.mixer_step(a, begin, end); });
    table.mixer_norm(a, 0, batch);

    Rows y = work.rows(width);
    run({linear(a.y, kMixerOut, y)});
    return y;
  }

  Rows attention(const Rows& x, const Window& window) {
    int64_t head_dim = window.head_dim;
    Rows q = work.rows(outputs(kQuery)), k = work.rows(outputs(kKey));
    Rows v = work.rows(outputs(kValue)), y = work.rows(width);
    run({linear(x, kQuery, q), linear(x, kKey, k), linear(x, kValue, v)});
    const Kernels& table = kernels();

    AttentionStep a;
    a.q = q, a.k = k, a.v = v, a.o = work.rows(outputs(kQuery));
    a.cache = window.ring.rows, a.int8_values = window.ring.int8_values;
    a.position = window.position;
    a.batch = batch, a.steps = 1, a.ring = window.rows, a.window = window.size;
    a.heads = outputs(kQuery) / head_dim, a.key_heads = outputs(kKey) / head_dim;
    a.value_heads = outputs(kValue) / head_dim, a.key_dim = a.value_dim = head_dim;
    a.scale = 1.0f / sqrtf(static_cast<float>(head_dim));
    if (window.half) {
      Rope rope{q, window.cos, window.sin, batch, a.heads, head_dim, window.half};
      table.rope(rope, 0, batch);
      rope.x = k, rope.heads = a.key_heads;
      table.rope(rope, 0, batch);
    }
    int64_t splits = window_splits(window.size);
    a.scratch = work.floats(attention_scratch(a, splits));
    table.attention_write(a, 0, batch);
    team.run(batch * splits, 1, [&](int64_t begin, int64_t end) {
      table.attention_scan(a, splits, begin, end);
    });
    team.run(batch * a.heads, grain(splits * head_dim), [&](int64_t begin, int64_t end) {
      table.attention_merge(a, splits, begin, end);
    });
    run({linear(a.o, kAttnOut, y)});
    return y;
  }

  Rows mlp(const Rows& x) {
    int64_t inner = outputs(kFfnIn) / 2;
    Rows expanded = work.rows(2 * inner), gated = work.rows(inner), y = work.rows(width);
    run({linear(x, kFfnIn, expanded)});
    Pairwise a{expanded, columns(expanded, inner), gated, batch, inner};
    team.run(batch * blocks(inner), grain(8 * kBlock),
             [&](int64_t begin, int64_t end) { kernels().gate(a, begin, end); });
    run({linear(gated, kFfnOut, y)});
    return y;
  }
};

int64_t widest_input(const BlockArguments& block) {
  return prepared_row(*std::max_element(block.inputs, block.inputs + kCount));
}

// Floats that the intermediate results take, with padding of a line for each of them.
int64_t workspace_size(const BlockArguments& block, int64_t batch, int64_t width, int64_t window,
                       int64_t head_dim) {
  const std::vector<Tensor>& w = block.weights;
  int64_t inner = w[kGateOut].size(0), gates = w[kMemGate].size(0);
  int64_t columns = widest_input(block) + 4 * width + 5 * inner + blocks(inner) + 4 * gates +
                    w[kGateIn].size(0);
  if (w.size() == kCount) {
    int64_t heads = w[kQuery].size(0);
    columns += 4 * width + 2 * heads + w[kKey].size(0) + w[kValue].size(0);
    columns += window_splits(window) * part_size(heads / head_dim, head_dim);
    columns += 2 * w[kFfnIn].size(0);
  }
  return batch * columns + Workspace::padding(32);
}

Tensor blocks_step(const Tensor& stream, const std::vector<Tensor>& weights,
                   const std::vector<Tensor>& scales, const std::vector<Tensor>& taps,
                   const std::vector<Tensor>& states, const std::vector<Tensor>& rings,
                   const OptionalTensor& position, const OptionalTensor& cos,
                   const OptionalTensor& sin, int64_t window_size, int64_t head_dim,
                   double key_eps, double norm_eps, bool persistent) {
  STD_TORCH_CHECK(!persistent, "blocks_step(impl='persistent') needs a GPU");
  std::vector<BlockArguments> arguments = block_arguments(
      stream, weights, scales, taps, states, rings, position, cos, sin, window_size, head_dim);
  int64_t batch = stream.size(0), width = stream.size(1), floats = 0;
  for (const BlockArguments& given : arguments) {
    if (given.window) check_positions(given.window->position, batch);
    floats = std::max(floats, workspace_size(given, batch, width, window_size, head_dim));
  }
  Tensor result = output_like(stream, {batch, width}, stream.scalar_type());
  Tensor memory = output_like(stream, {floats}, ScalarType::Float);
  Rows start = rows_of("stream", stream, stream), last = output_rows(result);
  with_team([&](Team& team) {
    size_t left = arguments.size();
    for (const BlockArguments& given : arguments) {
      Workspace work(static_cast<float*>(memory.data_ptr()), floats, batch,
                     type_of("conv", given.weights[kConv]));
      Block block{given, given.weights, stream, batch, width, key_eps, norm_eps, work, team, nullptr};
      // at the same place for all blocks; they alternate, so none writes the stream that it reads
      Rows between = block.work.rows(width, last.type), sum = left-- % 2 ? last : between;
      block.converted = block.work.floats(batch * widest_input(given));
      Rows normed = block.work.rows(width);
      block.norm(start, kMixerNorm, normed);
      Rows branch = block.mixer(normed, given.taps, given.state);
      if (given.window) {
        block.norm(branch, kAttnNorm, normed, start, sum);
        Rows attended = block.attention(normed, *given.window);
        // only the MLP reads the sum with the attention's output
        Rows inside = block.work.rows(width, sum.type);
        block.norm(attended, kFfnNorm, normed, sum, inside);
        branch = block.mlp(normed), start = sum;
      }
      kernels().add({start, branch, sum, batch, width}, 0, batch * blocks(width));
      start = sum;
    }
  });
  return result;
}

}  // namespace
}  // namespace rodimus

STABLE_TORCH_LIBRARY_IMPL(rodimus, CPU, m) {
  m.impl("native_blocks_step", TORCH_BOX(&rodimus::blocks_step));
}
