// The operators of torch.ops.rodimus on CUDA: arguments and registration.
#include "launch.h"

extern "C" __attribute__((used, visibility("default"))) const char rodimus_cuda_sources[] =
    "RODIMUS-SOURCES:" RODIMUS_SOURCES;
extern "C" __attribute__((used, visibility("default"))) const char rodimus_cuda_archs[] =
    "RODIMUS-ARCHS:" RODIMUS_ARCHS;

// The runtime's problem in words; null if it has none.
extern "C" __attribute__((visibility("default"))) const char* rodimus_cuda_problem() {
  cudaError_t error = rodimus::runtime_problem();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

namespace rodimus {
namespace {

Tensor ddts_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_decay,
                 const Tensor& state, double scale) {
  auto [a, o] = ddts_step_arguments(q, k, v, log_decay, state, scale);
  check_keys(a.key_dim), check_rows("B * H", a.rows);
  launch(launch_ddts_step, a, o);
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
  check_keys(a.key_dim), check_rows("B", a.rows);
  // torch reuses a stream's memory on that stream only, so it may be freed before the kernel runs
  Tensor memory = output_like(x, {mixer_scratch(a, step_columns(a.rows))}, ScalarType::Float);
  a.scratch = static_cast<float*>(memory.data_ptr());
  launch(launch_mixer_step, a, y);
  return y;
}

Tensor short_conv_step(const Tensor& x, const Tensor& conv_state, const Tensor& weight,
                       const OptionalTensor& bias) {
  auto [a, y] = conv_step_arguments(x, conv_state, weight, bias);
  check_rows("B", a.rows);
  launch(launch_conv_step, a, y);
  return y;
}

Tensor linear_step(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& scale) {
  auto [a, y] = linear_arguments(x, weight, bias, scale);
  launch(launch_linear, a, y);
  return y;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  auto [a, y, sum] = norm_arguments(x, weight, std::nullopt, std::nullopt, std::nullopt, eps);
  launch(launch_norm, a, y);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps) {
  auto [a, y, sum] = norm_arguments(x, weight, residual, std::nullopt, std::nullopt, eps);
  launch(launch_norm, a, y);
  return {y, *sum};
}

Tensor gated_rms_norm(const Tensor& x, const Tensor& gate, const Tensor& weight,
                      const OptionalTensor& residual, const OptionalTensor& residual_weight,
                      double eps) {
  auto [a, y, sum] = norm_arguments(x, weight, residual, residual_weight, gate, eps);
  launch(launch_norm, a, y);
  return y;
}

Tensor shared_key_attention_step(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& cache, const Tensor& position, int64_t window_size,
                                 double scale) {
  auto [a, o] = attention_step_arguments(q, k, v, cache, position, window_size, scale);
  STD_TORCH_CHECK(a.key_dim <= kMaxHeadDim && a.value_dim <= kMaxHeadDim,
                  "D and Dv must be at most ", kMaxHeadDim, ", got ", a.key_dim, " and ",
                  a.value_dim);
  check_rows("B * T", a.batch * a.steps);
  Tensor memory = output_like(q, {attention_parts_scratch(a, attention_parts(a))}, ScalarType::Float);
  a.scratch = static_cast<float*>(memory.data_ptr());
  // launched for q, not o: if values have no channels, keys still go into the ring
  launch(launch_attention_step, a, q);
  return o;
}

}  // namespace
}  // namespace rodimus

STABLE_TORCH_LIBRARY_IMPL(rodimus, CUDA, m) {
  m.impl("native_ddts_step", TORCH_BOX(&rodimus::ddts_step));
  m.impl("native_ddts_mixer_step", TORCH_BOX(&rodimus::ddts_mixer_step));
  m.impl("native_short_conv_step", TORCH_BOX(&rodimus::short_conv_step));
  m.impl("native_linear_step", TORCH_BOX(&rodimus::linear_step));
  m.impl("native_rms_norm", TORCH_BOX(&rodimus::rms_norm));
  m.impl("native_add_rms_norm", TORCH_BOX(&rodimus::add_rms_norm));
  m.impl("native_gated_rms_norm", TORCH_BOX(&rodimus::gated_rms_norm));
  m.impl("native_shared_key_attention_step", TORCH_BOX(&rodimus::shared_key_attention_step));
}
