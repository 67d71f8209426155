// The operators of torch.ops.rodimus on the CPU: arguments, threads, registration.
#include "../tensors.h"
#include "kernels.h"
#include "threads.h"

// The loader compares this digest with the sources, and refuses a library built from other ones.
extern "C" __attribute__((used, visibility("default"))) const char rodimus_cpu_sources[] =
    "RODIMUS-SOURCES:" RODIMUS_SOURCES;

namespace rodimus {
namespace {

// Scratch memory lives until the tensor that is returned dies.
Tensor scratch(const Tensor& like, int64_t floats) {
  return output_like(like, {floats}, ScalarType::Float);
}

float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

Tensor ddts_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
                 const Tensor& state, double scale) {
  auto [a, o] = ddts_step_arguments(q, k, v, log_decay, state, scale);
  const DdtsStep& arguments = a;
  parallel_for(0, a.rows * blocks(a.value_dim), grain(a.key_dim * kBlock),
               [&](int64_t begin, int64_t end) { kernels().ddts_step(arguments, begin, end); });
  return o;
}

Tensor ddts_mixer_step(const Tensor& q, const Tensor& k, const Tensor& select,
                       const Tensor& temper, const Tensor& gate_hidden, const Tensor& x,
                       const Tensor& shifted, const Tensor& gate, const Tensor& state,
                       const Tensor& gate_weight, const Tensor& gate_bias,
                       const Tensor& residual_weight, const Tensor& norm_weight, double scale,
                       double key_eps, double norm_eps) {
  auto [a, y] = mixer_step_arguments(q, k, select, temper, gate_hidden, x, shifted, gate, state,
                                     gate_weight, gate_bias, residual_weight, norm_weight, scale,
                                     key_eps, norm_eps);
  Tensor memory = scratch(x, mixer_scratch(a));
  a.scratch = floats(memory);
  const MixerStep& arguments = a;
  const Kernels& table = kernels();
  parallel_for(0, a.rows, grain(16 * a.key_dim),
               [&](int64_t begin, int64_t end) { table.mixer_gates(arguments, begin, end); });
  parallel_for(0, a.rows * blocks(a.value_dim), grain(a.key_dim * kBlock),
               [&](int64_t begin, int64_t end) { table.mixer_step(arguments, begin, end); });
  parallel_for(0, a.rows, grain(a.value_dim),
               [&](int64_t begin, int64_t end) { table.mixer_norm(arguments, begin, end); });
  return y;
}

Tensor short_conv_step(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                       const OptionalTensor& bias) {
  auto [a, y] = conv_step_arguments(x, conv_state, weight, bias);
  const ConvStep& arguments = a;
  parallel_for(0, a.rows * blocks(a.channels), grain(a.width * kBlock),
               [&](int64_t begin, int64_t end) { kernels().conv_step(arguments, begin, end); });
  return y;
}

Tensor short_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& initial_state, const OptionalTensor& seq_idx) {
  auto [a, y] = conv_arguments(x, weight, bias, initial_state, seq_idx);
  const Conv& arguments = a;
  parallel_for(0, conv_tasks(a), 1,
               [&](int64_t begin, int64_t end) { kernels().conv(arguments, begin, end); });
  return y;
}

Tensor linear_step(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& scale) {
  auto [a, y] = linear_arguments(x, weight, bias, scale);
  Tensor memory = scratch(x, linear_scratch(a));
  a.scratch = floats(memory);
  const Linear& arguments = a;
  const Kernels& table = kernels();
  table.linear_prepare(a);
  with_team([&](Team& team) {
    team.run(arguments.outputs, rows_at_a_time(arguments.inputs * arguments.rows),
             [&](int64_t begin, int64_t end) { table.linear(arguments, begin, end); });
  });
  return y;
}

void run_norm(const Norm& a) {
  parallel_for(0, a.rows, grain(a.dim),
               [&](int64_t begin, int64_t end) { kernels().norm(a, begin, end); });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  auto [a, y, sum] = norm_arguments(x, weight, std::nullopt, std::nullopt, std::nullopt, eps);
  run_norm(a);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps) {
  auto [a, y, sum] = norm_arguments(x, weight, residual, std::nullopt, std::nullopt, eps);
  run_norm(a);
  return {y, *sum};
}

Tensor gated_rms_norm(const Tensor& x, const Tensor& gate, const Tensor& weight,
                      const OptionalTensor& residual, const OptionalTensor& residual_weight,
                      double eps) {
  auto [a, y, sum] = norm_arguments(x, weight, residual, residual_weight, gate, eps);
  run_norm(a);
  return y;
}

Tensor shared_key_attention_step(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& cache, const Tensor& position, int64_t window_size,
                                 double scale) {
  auto [a, o] = attention_step_arguments(q, k, v, cache, position, window_size, scale);
  int64_t splits = window_splits(a.window + a.steps - 1);
  check_positions(a.position, a.batch);
  Tensor memory = scratch(q, attention_scratch(a, splits));
  a.scratch = floats(memory);
  const AttentionStep& arguments = a;
  const Kernels& table = kernels();
  table.attention_write(a, 0, a.batch);
  parallel_for(0, a.batch * splits, 1, [&](int64_t begin, int64_t end) {
    table.attention_scan(arguments, splits, begin, end);
  });
  parallel_for(0, a.batch * a.steps * a.heads, grain(splits * a.value_dim),
               [&](int64_t begin, int64_t end) {
                 table.attention_merge(arguments, splits, begin, end);
               });
  return o;
}

}  // namespace
}  // namespace rodimus

STABLE_TORCH_LIBRARY_IMPL(rodimus, CPU, m) {
  m.impl("native_ddts_step", TORCH_BOX(&rodimus::ddts_step));
  m.impl("native_ddts_mixer_step", TORCH_BOX(&rodimus::ddts_mixer_step));
  m.impl("native_short_conv_step", TORCH_BOX(&rodimus::short_conv_step));
  m.impl("native_short_conv", TORCH_BOX(&rodimus::short_conv));
  m.impl("native_linear_step", TORCH_BOX(&rodimus::linear_step));
  m.impl("native_rms_norm", TORCH_BOX(&rodimus::rms_norm));
  m.impl("native_add_rms_norm", TORCH_BOX(&rodimus::add_rms_norm));
  m.impl("native_gated_rms_norm", TORCH_BOX(&rodimus::gated_rms_norm));
  m.impl("native_shared_key_attention_step", TORCH_BOX(&rodimus::shared_key_attention_step));
}
