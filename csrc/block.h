// Arguments and workspace of a step through blocks, the same for CPU and CUDA.
#pragma once

#include <algorithm>

#include "tensors.h"
#include "workspace.h"

namespace rodimus {

// Arguments of a block, and what its attention reads; a block without attention has no window.
struct BlockArguments {
  std::vector<Tensor> weights;
  Tensor taps, state;
  std::optional<Window> window;
  // for matrices, in the order of Weight: their number of inputs, and the scales of quantised ones
  int64_t inputs[kCount] = {};
  const void* scales[kCount] = {};
};

// Convolution weights have the type of the activations; matrices too, or all are quantised.
inline void check_weights(BlockArguments& block, const Tensor& stream, int64_t head_dim) {
  const std::vector<Tensor>& w = block.weights;
  int64_t count = static_cast<int64_t>(w.size());
  STD_TORCH_CHECK(count == kCountWithoutAttention || count == kCount, "expected ",
                  static_cast<int>(kCountWithoutAttention), " or ", static_cast<int>(kCount),
                  " weights, got ", count);
  int64_t width = stream.size(1), inner = w[kGateOut].size(0);
  auto matrix = [&](const char* name, int which, int64_t rows, int64_t size) {
    weight_of(name, w[which], rows, size, stream), block.inputs[which] = size;
    if (!is_quantized(w[which]) || !is_quantized(w[kFc])) check_type(name, w[which], w[kFc]);
  };
  check_shape("conv", w[kConv], {w[kGateOut].size(0), kAny});
  if (!is_quantized(w[kFc])) check_type("conv", w[kConv], w[kFc]);
  STD_TORCH_CHECK(!is_int4(w[kGateOut]), "gate_out is taken in at least 8 bits, got 4");
  auto vector = [&](const char* name, int which, int64_t size) {
    check_shape(name, w[which], {size}), rows_of(name, w[which], stream);
  };
  auto halves = [&](const char* name, int which) {
    STD_TORCH_CHECK(w[which].size(0) % 2 == 0, name, " must have an even number of rows, got ",
                    w[which].size(0));
  };
  rows_of("conv", w[kConv], stream), halves("mem_gate", kMemGate);
  vector("mixer_norm", kMixerNorm, width), matrix("fc", kFc, 2 * inner, width);
  vector("conv_bias", kConvBias, inner);
  int64_t gates = w[kMemGate].size(0);
  matrix("in_proj", kQueryKey, gates, inner), matrix("mem_gate", kMemGate, gates, inner);
  vector("mem_gate_bias", kMemBias, gates), matrix("gate_in", kGateIn, kAny, inner);
  matrix("gate_out", kGateOut, inner, w[kGateIn].size(0)), vector("gate_bias", kGateBias, inner);
  vector("residual_weight", kResidual, inner), vector("act_norm", kActNorm, inner);
  matrix("mixer_out", kMixerOut, width, inner);
  if (count == kCountWithoutAttention) return;
  int64_t attended = w[kQuery].size(0), values = w[kValue].size(0), keys = w[kKey].size(0);
  vector("attn_norm", kAttnNorm, width), vector("ffn_norm", kFfnNorm, width);
  matrix("query", kQuery, kAny, width), matrix("key", kKey, kAny, width);
  matrix("value", kValue, kAny, width), matrix("attn_out", kAttnOut, width, attended);
  matrix("ffn_in", kFfnIn, kAny, width), halves("ffn_in", kFfnIn);
  matrix("ffn_out", kFfnOut, width, w[kFfnIn].size(0) / 2);
  STD_TORCH_CHECK(head_dim >= 1 && keys >= head_dim && values >= head_dim &&
                      attended % keys == 0 && attended % values == 0 && keys % head_dim == 0 &&
                      values % head_dim == 0,
                  "heads of ", head_dim, " do not fit ", attended, " query, ", keys, " key and ",
                  values, " value channels");
}

inline Window window_of(const std::vector<Tensor>& w, const Tensor& stream, const OptionalTensor& ring,
                 const OptionalTensor& position, const OptionalTensor& cos,
                 const OptionalTensor& sin, int64_t size, int64_t head_dim) {
  int64_t batch = stream.size(0);
  STD_TORCH_CHECK(ring && position, "a block with attention needs ring and position");
  Window window;
  window.ring = ring_of("ring", *ring, w[kConv], w[kKey].size(0), w[kValue].size(0) / head_dim,
                        head_dim);
  check_shape("ring", *ring, {batch, kAny, kAny});
  STD_TORCH_CHECK(size >= 1 && ring->size(1) >= size, "ring must have at least window_size = ", size,
                  " rows, got shape ", shape_of(*ring));
  check_shape("position", *position, {batch}), check_device("position", *position, stream);
  STD_TORCH_CHECK(position->scalar_type() == ScalarType::Long && position->is_contiguous(),
                  "position must be contiguous int64, got scalar type ",
                  static_cast<int>(position->scalar_type()));
  window.rows = ring->size(1);
  window.position = static_cast<const int64_t*>(position->data_ptr());
  window.half = cos ? cos->size(1) : 0, window.head_dim = head_dim, window.size = size;
  if (window.half) {
    STD_TORCH_CHECK(sin && 2 * window.half <= head_dim, "rotary tables must fit heads of ", head_dim);
    check_shape("cos", *cos, {batch, window.half}), check_shape("sin", *sin, {batch, window.half});
    window.cos = rows_of("cos", *cos, stream), window.sin = rows_of("sin", *sin, stream);
  }
  return window;
}

// All arguments of all blocks, checked before the first of them runs. The lists hold the tensors of
// the first block, then those of the second, and so on; `rings` is empty for blocks without
// attention, and `scales` has one tensor for each quantised matrix.
inline std::vector<BlockArguments> block_arguments(
    const Tensor& stream, const std::vector<Tensor>& weights, const std::vector<Tensor>& scales,
    const std::vector<Tensor>& taps, const std::vector<Tensor>& states,
    const std::vector<Tensor>& rings, const OptionalTensor& position, const OptionalTensor& cos,
    const OptionalTensor& sin, int64_t window_size, int64_t head_dim) {
  check_shape("stream", stream, {kAny, kAny});
  int64_t batch = stream.size(0);
  STD_TORCH_CHECK(batch >= 1 && batch <= kMaxRows, "stream must have 1 to ", kMaxRows,
                  " rows, got ", batch);
  size_t count = taps.size(), each = count ? weights.size() / count : 0;
  STD_TORCH_CHECK(count && weights.size() == count * each && states.size() == count &&
                      (rings.empty() || rings.size() == count),
                  "expected weights, taps, a state and a ring for each block, got ",
                  weights.size(), ", ", count, ", ", states.size(), " and ", rings.size());
  std::vector<BlockArguments> blocks;
  auto scale = scales.begin();
  for (size_t i = 0; i < count; ++i) {
    auto first = weights.begin() + i * each;
    BlockArguments block{{first, first + each}, taps[i], states[i]};
    const std::vector<Tensor>& w = block.weights;
    check_weights(block, stream, head_dim);
    int64_t inner = w[kGateOut].size(0);
    check_shape("taps", block.taps, {batch, inner, w[kConv].size(1)});
    check_shape("state", block.state, {batch, 1, w[kMemGate].size(0) / 2, inner});
    check_type("taps", block.taps, w[kConv]), check_device("taps", block.taps, stream);
    STD_TORCH_CHECK(block.taps.is_contiguous(), "taps must be contiguous, got last stride ",
                    block.taps.stride(2));
    state_of(block.state, stream);
    if (each == kCount) {
      OptionalTensor ring = rings.empty() ? std::nullopt : OptionalTensor(rings[i]);
      block.window = window_of(w, stream, ring, position, cos, sin, window_size, head_dim);
    }
    for (Weight matrix : kMatrices) {
      if (matrix >= static_cast<int>(each) || !is_quantized(w[matrix])) continue;
      STD_TORCH_CHECK(scale != scales.end(), "expected a scale for each quantised matrix, got ",
                      scales.size());
      block.scales[matrix] = scale_of("a matrix", *scale++, w[matrix], stream);
    }
    blocks.push_back(std::move(block));
  }
  STD_TORCH_CHECK(scale == scales.end(), "expected a scale for each quantised matrix, got ",
                  scales.size());
  return blocks;
}

}  // namespace rodimus
