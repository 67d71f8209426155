// From torch tensors to kernel arguments: every check of the native operators, the same for CPU and
// CUDA. Messages say what was expected and what was given.
#pragma once

#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "arguments.h"
#include "int8_values.h"

namespace rodimus {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kAny = -1;

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  for (int64_t size : sizes) {
    text << (text.tellp() > 0 ? ", " : "[");
    size == kAny ? text << "any" : text << size;
  }
  return sizes.empty() ? "[]" : text.str() + "]";
}

inline std::string shape_of(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return shape_text(sizes);
}

inline void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> expected) {
  bool fits = x.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (int64_t size : expected) fits = fits && (size == kAny || x.size(i) == size), ++i;
  STD_TORCH_CHECK(fits, name, " must have shape ", shape_text(expected), ", got ", shape_of(x));
}

inline Type type_of(const char* name, const Tensor& x) {
  ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name,
                  " must be float32 or bfloat16, got scalar type ", static_cast<int>(type));
  return type == ScalarType::Float ? Type::kFloat32 : Type::kBFloat16;
}

inline void check_device(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.is_cpu() == like.is_cpu() && x.get_device_index() == like.get_device_index(),
                  name, " must be on the device of the first argument");
}

inline void check_type(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name,
                  " must have the element type of the first argument, got scalar type ",
                  static_cast<int>(x.scalar_type()), " instead of ",
                  static_cast<int>(like.scalar_type()));
}

// A tensor as rows of its last dimension, which must be dense. Rows of a matrix may have gaps
// between them, rows over several dimensions may not.
inline Rows rows_of(const char* name, const Tensor& x, const Tensor& like, Type type) {
  check_device(name, x, like);
  int64_t dim = x.dim(), size = x.size(dim - 1);
  bool dense = x.is_contiguous() || (dim <= 2 && (size == 1 || x.stride(dim - 1) == 1));
  STD_TORCH_CHECK(dense, name, " must be contiguous, or a matrix with dense rows; got shape ",
                  shape_of(x), " and last stride ", x.stride(dim - 1));
  Rows rows;
  rows.data = x.data_ptr();
  rows.type = type;
  rows.stride = dim == 2 && !x.is_contiguous() ? x.stride(0) : size;
  return rows;
}

inline Rows rows_of(const char* name, const Tensor& x, const Tensor& like) {
  return rows_of(name, x, like, type_of(name, x));
}

inline bool is_int8(const Tensor& x) { return x.scalar_type() == ScalarType::Char; }
inline bool is_int4(const Tensor& x) { return x.scalar_type() == ScalarType::Byte; }
inline bool is_quantized(const Tensor& x) { return is_int8(x) || is_int4(x); }

// A matrix [outputs, inputs] of a linear layer, whose elements may be int8 or int4.
inline Rows weight_of(const char* name, const Tensor& x, int64_t outputs, int64_t inputs,
                      const Tensor& like) {
  int64_t units = (inputs + kInt4Unit - 1) / kInt4Unit;
  check_shape(name, x, {outputs, is_int4(x) ? units * kInt4Unit / 2 : inputs});
  if (is_int4(x)) return rows_of(name, x, like, Type::kInt4);
  return is_int8(x) ? rows_of(name, x, like, Type::kInt8) : rows_of(name, x, like);
}

// Scales of the rows of an int8 matrix, or of the groups of an int4 matrix.
inline const void* scale_of(const char* name, const Tensor& scale, const Tensor& weight,
                            const Tensor& like) {
  STD_TORCH_CHECK(like.is_cpu(), name, " is quantised, which only the CPU's operators take");
  check_device("scale", scale, like);
  if (is_int8(weight))
    check_shape("scale", scale, {weight.size(0)});
  else
    check_shape("scale", scale, {weight.size(0), 2 * weight.size(1) / kInt4Group});
  ScalarType type = is_int8(weight) ? ScalarType::Float : ScalarType::BFloat16;
  STD_TORCH_CHECK(scale.scalar_type() == type && scale.is_contiguous(), "scale of ", name,
                  " must be contiguous ", is_int8(weight) ? "float32" : "bfloat16",
                  ", got scalar type ", static_cast<int>(scale.scalar_type()));
  return scale.data_ptr();
}

inline Rows optional_rows(const char* name, const OptionalTensor& x, int64_t size,
                          const Tensor& like) {
  if (!x) return Rows();
  check_shape(name, *x, {size});
  return rows_of(name, *x, like);
}

inline float* state_of(const Tensor& state, const Tensor& like) {
  check_device("state", state, like);
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Float && state.is_contiguous(),
                  "state must be contiguous float32, got scalar type ",
                  static_cast<int>(state.scalar_type()), " and shape ", shape_of(state),
                  state.is_contiguous() ? "" : ", not contiguous");
  return static_cast<float*>(state.data_ptr());
}

// For positions in CPU memory. The upper limit keeps sums of positions and sizes far from overflow.
inline void check_positions(const int64_t* position, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(position[b] >= 0, "position must be >= 0, got ", position[b]);
    STD_TORCH_CHECK(position[b] <= int64_t{1} << 62, "position must be at most 2^62, got ",
                    position[b]);
  }
}

// To be called last, when everything has been checked.
inline Tensor output_like(const Tensor& like, std::initializer_list<int64_t> shape,
                          std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(
      like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
}

inline Rows output_rows(const Tensor& x) { return rows_of("output", x, x); }

inline std::tuple<DdtsStep, Tensor> ddts_step_arguments(const Tensor& q, const Tensor& k,
                                                        const Tensor& v, const Tensor& log_decay,
                                                        const Tensor& state, double scale) {
  check_shape("q", q, {kAny, kAny, kAny});
  int64_t batch = q.size(0), heads = q.size(1), keys = q.size(2);
  check_shape("k", k, {batch, heads, keys});
  check_shape("v", v, {batch, heads, kAny});
  check_shape("log_decay", log_decay, {batch, heads, keys});
  check_shape("state", state, {batch, heads, keys, v.size(2)});
  DdtsStep a;
  a.q = rows_of("q", q, q);
  a.k = rows_of("k", k, q);
  a.log_decay = rows_of("log_decay", log_decay, q);
  a.v = rows_of("v", v, q);
  a.state = state_of(state, q);
  a.rows = batch * heads, a.key_dim = keys, a.value_dim = v.size(2);
  a.scale = static_cast<float>(scale);
  Tensor o = output_like(v, {batch, heads, v.size(2)});
  a.o = output_rows(o);
  return {a, o};
}

inline std::tuple<MixerStep, Tensor> mixer_step_arguments(
    const Tensor& q, const Tensor& k, const Tensor& select, const Tensor& temper,
    const Tensor& gate_hidden, const Tensor& x, const Tensor& shifted, const Tensor& gate,
    const Tensor& state, const Tensor& gate_weight, const Tensor& gate_bias,
    const Tensor& residual_weight, const Tensor& norm_weight, double scale, double key_eps,
    double norm_eps) {
  check_shape("q", q, {kAny, kAny});
  check_shape("x", x, {q.size(0), kAny});
  check_shape("gate_hidden", gate_hidden, {q.size(0), kAny});
  int64_t batch = q.size(0), keys = q.size(1), values = x.size(1);
  MixerStep a;
  a.q = rows_of("q", q, q);
  std::tuple<const char*, const Tensor*, Rows*> alike[] = {
      {"k", &k, &a.k}, {"select", &select, &a.select}, {"temper", &temper, &a.temper}};
  for (auto& [name, tensor, out] : alike) {
    check_shape(name, *tensor, {batch, keys});
    *out = rows_of(name, *tensor, q);
  }
  a.x = rows_of("x", x, q);
  std::tuple<const char*, const Tensor*, Rows*> wide[] = {{"shifted", &shifted, &a.shifted},
                                                          {"gate", &gate, &a.gate}};
  for (auto& [name, tensor, out] : wide) {
    check_shape(name, *tensor, {batch, values});
    *out = rows_of(name, *tensor, q);
  }
  a.gate_hidden = rows_of("gate_hidden", gate_hidden, q);
  check_shape("gate_weight", gate_weight, {values, gate_hidden.size(1)});
  check_type("gate_weight", gate_weight, gate_hidden);
  a.gate_weight = rows_of("gate_weight", gate_weight, q);
  a.gate_bias = optional_rows("gate_bias", gate_bias, values, q);
  a.residual_weight = optional_rows("residual_weight", residual_weight, values, q);
  a.norm_weight = optional_rows("norm_weight", norm_weight, values, q);
  check_shape("state", state, {batch, 1, keys, values});
  a.state = state_of(state, q);
  a.rows = batch, a.key_dim = keys, a.value_dim = values, a.gate_dim = gate_hidden.size(1);
  a.scale = static_cast<float>(scale);
  a.key_eps = static_cast<float>(key_eps), a.norm_eps = static_cast<float>(norm_eps);
  Tensor y = output_like(x, {batch, values});
  a.y = output_rows(y);
  a.scratch = nullptr;
  return {a, y};
}

inline std::tuple<ConvStep, Tensor> conv_step_arguments(const Tensor& x, const Tensor& state,
                                                        const Tensor& weight,
                                                        const OptionalTensor& bias) {
  check_shape("x", x, {kAny, kAny});
  check_shape("weight", weight, {x.size(1), kAny});
  check_shape("conv_state", state, {x.size(0), x.size(1), weight.size(1)});
  check_type("conv_state", state, x);
  check_type("weight", weight, x);
  check_device("conv_state", state, x);
  STD_TORCH_CHECK(state.is_contiguous(), "conv_state must be contiguous, got shape ",
                  shape_of(state), " and last stride ", state.stride(2));
  ConvStep a;
  a.x = rows_of("x", x, x);
  a.weight = rows_of("weight", weight, x);
  a.bias = optional_rows("bias", bias, x.size(1), x);
  a.state = state.data_ptr();
  a.rows = x.size(0), a.channels = x.size(1), a.width = weight.size(1);
  Tensor y = output_like(x, {x.size(0), x.size(1)});
  a.y = output_rows(y);
  return {a, y};
}

inline std::tuple<Conv, Tensor> conv_arguments(const Tensor& x, const Tensor& weight,
                                               const OptionalTensor& bias,
                                               const OptionalTensor& state,
                                               const OptionalTensor& documents) {
  check_shape("x", x, {kAny, kAny, kAny});
  int64_t batch = x.size(0), length = x.size(1), channels = x.size(2);
  check_shape("weight", weight, {channels, kAny});
  check_type("weight", weight, x);
  STD_TORCH_CHECK(weight.size(1) >= 1 && weight.size(1) <= kMaxTaps,
                  "weight must have 1 to ", kMaxTaps, " taps, got ", weight.size(1));
  STD_TORCH_CHECK(channels == 1 || x.stride(2) == 1, "x must have dense rows, got last stride ",
                  x.stride(2));
  Conv a;
  a.x.data = x.data_ptr(), a.x.type = type_of("x", x), a.x.stride = x.stride(1);
  a.sequence_stride = x.stride(0);
  a.weight = rows_of("weight", weight, x);
  a.bias = optional_rows("bias", bias, channels, x);
  a.batch = batch, a.length = length, a.channels = channels, a.width = weight.size(1);
  if (state) {
    check_shape("initial_state", *state, {batch, channels, a.width});
    check_type("initial_state", *state, x), check_device("initial_state", *state, x);
    STD_TORCH_CHECK(state->is_contiguous(), "initial_state must be contiguous, got shape ",
                    shape_of(*state), " and last stride ", state->stride(2));
    a.state = state->data_ptr();
  }
  if (documents) {
    check_shape("seq_idx", *documents, {batch, length}), check_device("seq_idx", *documents, x);
    STD_TORCH_CHECK(!state, "initial_state and seq_idx exclude each other, got both");
    STD_TORCH_CHECK(documents->scalar_type() == ScalarType::Long && documents->is_contiguous(),
                    "seq_idx must be contiguous int64, got scalar type ",
                    static_cast<int>(documents->scalar_type()));
    a.documents = static_cast<const int64_t*>(documents->data_ptr());
  }
  Tensor y = output_like(x, {batch, length, channels});
  a.y = output_rows(y);
  return {a, y};
}

inline std::tuple<Linear, Tensor> linear_arguments(const Tensor& x, const Tensor& weight,
                                                   const OptionalTensor& bias,
                                                   const OptionalTensor& scale) {
  check_shape("x", x, {kAny, kAny});
  STD_TORCH_CHECK(x.size(0) <= kMaxRows, "x must have at most ", kMaxRows, " rows, got ",
                  x.size(0));
  STD_TORCH_CHECK(is_quantized(weight) == scale.has_value(),
                  "quantised weights and their scale come together, got only one of them");
  if (!scale) check_type("weight", weight, x);
  Linear a;
  a.x = rows_of("x", x, x);
  a.weight = weight_of("weight", weight, kAny, x.size(1), x);
  if (scale) a.scale = scale_of("weight", *scale, weight, x);
  a.bias = optional_rows("bias", bias, weight.size(0), x);
  a.rows = x.size(0), a.inputs = x.size(1), a.outputs = weight.size(0);
  a.scratch = nullptr;
  Tensor y = output_like(x, {x.size(0), weight.size(0)});
  a.y = output_rows(y);
  return {a, y};
}

// One of the three norms: with a gate the gated one, with only a residual the one that adds it and
// returns the sum as well.
inline std::tuple<Norm, Tensor, OptionalTensor> norm_arguments(
    const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
    const OptionalTensor& residual_weight, const OptionalTensor& gate, double eps) {
  check_shape("x", x, {kAny, kAny});
  check_shape("weight", weight, {x.size(1)});
  Norm a;
  a.x = rows_of("x", x, x);
  a.weight = rows_of("weight", weight, x);
  a.rows = x.size(0), a.dim = x.size(1);
  a.eps = static_cast<float>(eps);
  if (gate) {
    check_shape("gate", *gate, {a.rows, a.dim});
    a.gate = rows_of("gate", *gate, x);
    STD_TORCH_CHECK(residual.has_value() == residual_weight.has_value(),
                    "residual and residual_weight come together, got only one of them");
  }
  if (residual) {
    check_shape("residual", *residual, {a.rows, a.dim});
    a.residual = rows_of("residual", *residual, x);
  }
  a.residual_weight = optional_rows("residual_weight", residual_weight, a.dim, x);
  OptionalTensor sum;
  if (residual && !gate) {
    sum = output_like(x, {a.rows, a.dim}, residual->scalar_type());
    a.sum = output_rows(*sum);
  }
  Tensor y = output_like(x, {a.rows, a.dim}, (gate ? x : weight).scalar_type());
  a.y = output_rows(y);
  return {a, y, sum};
}

// A ring [B, R, row] of keys and values of the type of `like`, or of bytes with 8-bit values.
inline Ring ring_of(const char* name, const Tensor& x, const Tensor& like, int64_t keys,
                    int64_t value_heads, int64_t value_dim) {
  Ring ring;
  ring.int8_values = x.scalar_type() == ScalarType::Byte;
  ring.rows.type = type_of("keys", like);
  int64_t size = ring.rows.type == Type::kFloat32 ? 4 : 2;
  int64_t row = keys + value_heads * value_dim;
  if (ring.int8_values)
    row = int8_row(keys * size, value_heads, value_dim).bytes;
  else
    check_type(name, x, like);
  check_shape(name, x, {kAny, kAny, row});
  check_device(name, x, like);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous, got shape ", shape_of(x),
                  " and last stride ", x.stride(2));
  ring.rows.data = x.data_ptr();
  STD_TORCH_CHECK(!ring.int8_values || reinterpret_cast<uintptr_t>(ring.rows.data) % 16 == 0, name,
                  " of 8-bit values must start on a multiple of 16 bytes, got offset ",
                  x.storage_offset());
  ring.rows.stride = ring.int8_values ? row / size : row;
  return ring;
}

inline std::tuple<AttentionStep, Tensor> attention_step_arguments(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache, const Tensor& position,
    int64_t window, double scale) {
  check_shape("q", q, {kAny, kAny, kAny, kAny});
  int64_t batch = q.size(0), steps = q.size(1), heads = q.size(2), dim = q.size(3);
  check_shape("k", k, {batch, steps, kAny, dim});
  check_shape("v", v, {batch, steps, kAny, kAny});
  check_type("k", k, q), check_type("v", v, q);
  Ring ring = ring_of("cache", cache, q, k.size(2) * dim, v.size(2), v.size(3));
  check_shape("cache", cache, {batch, kAny, kAny});
  check_shape("position", position, {batch});
  STD_TORCH_CHECK(k.size(2) > 0 && v.size(2) > 0 && heads % k.size(2) == 0 &&
                      heads % v.size(2) == 0,
                  "query heads must be a multiple of key and value heads, got ", heads, ", ",
                  k.size(2), " and ", v.size(2));
  STD_TORCH_CHECK(steps >= 1 && steps <= kMaxRows && window >= 1 &&
                      cache.size(1) >= window + steps - 1,
                  "cache needs at least window_size + T - 1 rows with 1 <= T <= 8, got ",
                  cache.size(1), " rows, window_size ", window, " and T ", steps);
  STD_TORCH_CHECK(position.scalar_type() == ScalarType::Long && position.is_contiguous(),
                  "position must be contiguous int64, got scalar type ",
                  static_cast<int>(position.scalar_type()));
  check_device("position", position, q);
  AttentionStep a;
  a.q = rows_of("q", q, q), a.q.stride = heads * dim;
  a.k = rows_of("k", k, q), a.k.stride = k.size(2) * dim;
  a.v = rows_of("v", v, q), a.v.stride = v.size(2) * v.size(3);
  a.cache = ring.rows, a.int8_values = ring.int8_values;
  a.position = static_cast<const int64_t*>(position.data_ptr());
  a.scratch = nullptr;
  a.batch = batch, a.steps = steps, a.ring = cache.size(1);
  a.heads = heads, a.key_heads = k.size(2), a.value_heads = v.size(2);
  a.key_dim = dim, a.value_dim = v.size(3), a.window = window;
  a.scale = static_cast<float>(scale);
  Tensor o = output_like(v, {batch, steps, heads, v.size(3)});
  a.o = output_rows(o), a.o.stride = heads * v.size(3);
  return {a, o};
}

}  // namespace rodimus
