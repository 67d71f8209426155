// Arguments and workspace of a block step, the same for CPU and CUDA.
#pragma once

#include <vector>

#include "tensors.h"

namespace rodimus {

// The weights in the order of rodimus_kernels.BlockWeights; Rodimus ends before kAttnNorm.
enum Weight {
  kMixerNorm, kFc, kConv, kConvBias, kQueryKey, kGateIn, kGateOut, kGateBias, kMemGate, kMemBias,
  kResidual, kActNorm, kMixerOut,
  kAttnNorm, kQuery, kKey, kValue, kAttnOut, kFfnNorm, kFfnIn, kFfnOut, kCount
};
constexpr int kCountWithoutAttention = kAttnNorm;

inline Rows columns(const Rows& x, int64_t first) {
  Rows part = x;
  int64_t size = x.type == Type::kFloat32 ? 4 : 2;
  part.data = static_cast<char*>(x.data) + first * size;
  return part;
}

// Intermediate results, carved out of one allocation of float32; each starts on a line.
class Workspace {
 public:
  // Rows are of `type`, that of the activations, where rows() is not told another.
  Workspace(const Tensor& like, int64_t rows, Type type, int64_t floats)
      : rows_(rows), type_(type), memory_(output_like(like, {floats}, ScalarType::Float)),
        next_(static_cast<float*>(memory_.data_ptr())), end_(next_ + floats) {}

  Rows rows(int64_t columns) { return rows(columns, type_); }
  Rows rows(int64_t columns, Type type) { return {floats(rows_ * columns), type, columns}; }

  float* floats(int64_t count) {
    float* here = next_;
    next_ += (count + kLine - 1) / kLine * kLine;
    STD_TORCH_CHECK(next_ <= end_, "the workspace of a block step is too small");
    return here;
  }

  // What `results` intermediate results take at most beyond their own numbers.
  static constexpr int64_t padding(int64_t results) { return results * kLine; }

 private:
  static constexpr int64_t kLine = 32;
  int64_t rows_;
  Type type_;
  Tensor memory_;
  float *next_, *end_;
};

// Rotary tables and ring of a block with attention.
struct Window {
  Ring ring;
  Rows cos, sin;
  const int64_t* position;
  int64_t rows, half, head_dim, size;
};

inline void check_weights(const std::vector<Tensor>& w, const Tensor& stream, int64_t head_dim) {
  int64_t count = static_cast<int64_t>(w.size());
  STD_TORCH_CHECK(count == kCountWithoutAttention || count == kCount, "expected ",
                  static_cast<int>(kCountWithoutAttention), " or ", static_cast<int>(kCount),
                  " weights, got ", count);
  int64_t width = stream.size(1), inner = w[kGateOut].size(0);
  auto matrix = [&](const char* name, int which, int64_t rows, int64_t size) {
    check_shape(name, w[which], {rows, size});
    check_type(name, w[which], w[kFc]);
  };
  auto vector = [&](const char* name, int which, int64_t size) {
    check_shape(name, w[which], {size});
  };
  vector("mixer_norm", kMixerNorm, width), matrix("fc", kFc, 2 * inner, width);
  matrix("conv", kConv, inner, kAny), vector("conv_bias", kConvBias, inner);
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
  matrix("ffn_in", kFfnIn, kAny, width), matrix("ffn_out", kFfnOut, width, w[kFfnIn].size(0) / 2);
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
  window.ring = ring_of("ring", *ring, w[kFc], w[kKey].size(0), w[kValue].size(0) / head_dim,
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

// Check all arguments of a block step, and say what its attention reads; nothing for a block without.
inline std::optional<Window> block_window(const Tensor& stream, const std::vector<Tensor>& weights,
                                          const Tensor& taps, const Tensor& state,
                                          const OptionalTensor& ring,
                                          const OptionalTensor& position,
                                          const OptionalTensor& cos, const OptionalTensor& sin,
                                          int64_t window_size, int64_t head_dim) {
  check_shape("stream", stream, {kAny, kAny});
  check_weights(weights, stream, head_dim);
  int64_t batch = stream.size(0), inner = weights[kGateOut].size(0);
  STD_TORCH_CHECK(batch >= 1 && batch <= kMaxRows, "stream must have 1 to ", kMaxRows,
                  " rows, got ", batch);
  check_shape("taps", taps, {batch, inner, weights[kConv].size(1)});
  check_shape("state", state, {batch, 1, weights[kMemGate].size(0) / 2, inner});
  check_type("taps", taps, weights[kFc]), check_device("taps", taps, stream);
  STD_TORCH_CHECK(taps.is_contiguous(), "taps must be contiguous, got last stride ",
                  taps.stride(2));
  state_of(state, stream);
  if (weights.size() != kCount) return std::nullopt;
  return window_of(weights, stream, ring, position, cos, sin, window_size, head_dim);
}

}  // namespace rodimus
