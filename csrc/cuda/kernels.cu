// Grids, blocks and template choices of the CUDA kernels. Compiled by nvcc without torch.
#include "kernels.h"

#include <atomic>

#include "attention.cuh"
#include "ddts_step.cuh"
#include "elementwise.cuh"
#include "linear.cuh"
#include "persistent.cuh"
#include "step_linear.cuh"

namespace rodimus {
namespace {

unsigned blocks_for(int64_t size, int64_t per_block) {
  return static_cast<unsigned>((size + per_block - 1) / per_block);
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// Whether a kernel on this device may start before the previous one has ended. Code for an older
// architecture does not wait for its turn, so this depends on the code that the device runs.
bool starts_under() {
  enum : int { kUnknown, kNo, kYes };
  static std::atomic<int> found[64];
  int device = 0;
  cudaGetDevice(&device);
  std::atomic<int>& here = found[device % 64];
  if (here == kUnknown) {
    cudaFuncAttributes code;
    bool waits = cudaFuncGetAttributes(&code, norm_kernel) == cudaSuccess && code.ptxVersion >= 90;
    here = waits ? kYes : kNo;
  }
  return here == kYes;
}

// Every kernel waits for its turn itself, so it may be started before the previous one has ended.
template <class... Parameters, class... Arguments>
void launch_started(void (*kernel)(Parameters...), dim3 grid, unsigned threads, int64_t shared,
                    cudaStream_t stream, const Arguments&... a) {
  cudaLaunchAttribute under;
  under.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  under.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared), config.stream = stream;
  config.attrs = &under, config.numAttrs = starts_under();
  cudaLaunchKernelEx(&config, kernel, a...);
}

// Call `run` with the smallest fitting number of keys and the columns of a block as constants.
template <class Run>
void with_tile(int64_t keys, int64_t rows, const Run& run) {
  auto with_columns = [&](auto padded) {
    if (step_columns(rows) == 32)
      run(padded, std::integral_constant<int, 32>());
    else
      run(padded, std::integral_constant<int, 128>());
  };
  if (keys <= 64)
    with_columns(std::integral_constant<int, 64>());
  else
    with_columns(std::integral_constant<int, 128>());
}

template <class T, int M>
void launch_linear_of(const Linear& a, cudaStream_t stream) {
  unsigned grid = blocks_for(a.outputs, kLinearWarps);
  constexpr int kSize = Piece<T>::kSize;
  auto starts_aligned = [](const Rows& r) {
    return reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && r.stride % kSize == 0;
  };
  if (a.inputs % kSize == 0 && starts_aligned(a.x) && starts_aligned(a.weight))
    launch_started(linear_kernel<T, M, true>, grid, kLinearWarps * kWarp, 0, stream, a);
  else
    launch_started(linear_kernel<T, M, false>, grid, kLinearWarps * kWarp, 0, stream, a);
}

template <int M>
void launch_linear_rows(const Linear& a, cudaStream_t stream) {
  if (a.rows <= M) {
    a.weight.type == Type::kFloat32 ? launch_linear_of<float, M>(a, stream)
                                    : launch_linear_of<__nv_bfloat16, M>(a, stream);
  } else if constexpr (M < kMaxRows) {
    launch_linear_rows<2 * M>(a, stream);
  }
}

// Allow a kernel this much dynamic shared memory: the same for all its launches, because another
// thread may be about to launch it. Set at each launch, because every device needs the setting.
template <class Kernel>
void allow_shared(Kernel* kernel, int64_t bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <int WARPS, int DEPTH, int BLOCKS, int SCALED>
void launch_step_linear_of(StepLinear a, const StepLinearLaunch& how, cudaStream_t stream) {
  a.together = how.together;
  auto* kernel = step_linear_kernel<WARPS, DEPTH, BLOCKS, SCALED>;
  if (how.asks()) allow_shared(kernel, kMostShared - how.fixed);
  launch_started(kernel, dim3(static_cast<unsigned>(all_tiles(a))), WARPS * kWarp, how.staged, stream,
                 a);
}

template <class T, bool INT8, int KEYS, int STAGES, int BLOCKS, int HEADS>
void launch_attention_staged(const AttentionStep& a, dim3 grid, cudaStream_t stream) {
  auto* kernel = attention_staged_kernel<T, INT8, KEYS, STAGES, BLOCKS, HEADS>;
  static_assert(attention_bytes<T, INT8, KEYS, STAGES>(HEADS) <= kMostShared);
  allow_shared(kernel, attention_bytes<T, INT8, KEYS, STAGES>(HEADS));
  launch_started(kernel, grid, static_cast<unsigned>(a.heads) * kHeadLanes,
                 attention_bytes<T, INT8, KEYS, STAGES>(a.value_heads), stream, a);
}

template <class T, bool INT8>
void launch_attention_of(AttentionStep a, cudaStream_t stream) {
  constexpr bool kWide = sizeof(T) == 4;
  a.parts = attention_parts(a);
  dim3 grid(static_cast<unsigned>(a.parts), static_cast<unsigned>(a.batch * a.steps));
  if (!fits_half_warps(a) || a.heads > kManyHeads) {
    launch_started(attention_any_kernel<T, INT8>, grid, kAnyThreads, 0, stream, a);
  } else if (a.heads > kFewHeads) {
    // not measured: as many bytes in flight as with few heads, with two blocks of more stages
    launch_attention_staged<T, INT8, INT8 ? 8 : kWide ? 2 : 4, 3, 2, kManyHeads>(a, grid, stream);
  } else if constexpr (INT8) {
    // as many bytes in flight as with plain values; other shapes were not measured
    launch_attention_staged<T, INT8, 8, 3, kWide ? 2 : 3, kFewHeads>(a, grid, stream);
  } else if constexpr (kWide) {
    launch_attention_staged<T, INT8, 4, 2, 2, kFewHeads>(a, grid, stream);
  } else {
    // three blocks of two stages keep more bytes in flight than two blocks of three
    launch_attention_staged<T, INT8, 8, 2, 3, kFewHeads>(a, grid, stream);
  }
  if (a.parts == 1) return;
  launch_started(attention_join_kernel, dim3(static_cast<unsigned>(a.heads), grid.y), kJoinThreads, 0,
                 stream, a);
}

template <int STAGES, int KEYS>
void launch_persistent_of(const BlockStep& a, cudaStream_t stream) {
  auto* kernel = persistent_kernel<STAGES, KEYS>;
  allow_shared(kernel, cooperative_shared());
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(multiprocessors()));
  config.blockDim = dim3(kPersistentThreads);
  config.dynamicSmemBytes = static_cast<size_t>(persistent_shared(a, STAGES)), config.stream = stream;
  config.attrs = &together, config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace

int64_t multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

int64_t cooperative_shared() {
  return attribute(cudaDevAttrCooperativeLaunch) ? attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) : 0;
}

void launch_persistent(const BlockStep& a, cudaStream_t stream) {
  auto launch = [&](auto stages) {
    a.mixer.key_dim <= 64 ? launch_persistent_of<stages, 64>(a, stream)
                          : launch_persistent_of<stages, kMaxKeys>(a, stream);
  };
  switch (persistent_stages(a, cooperative_shared())) {
    case 6: return launch(std::integral_constant<int, 6>());
    case 4: return launch(std::integral_constant<int, 4>());
    case 2: return launch(std::integral_constant<int, 2>());
  }
}

void launch_block_step(const BlockStep& a, cudaStream_t stream) {
  for_parts(
      a, [&](const StepLinear& step) { launch_step_linear(step, stream); },
      [&](const MixerStep& step) { launch_mixer_state(step, stream); },
      [&](const AttentionStep& step) { launch_attention_step(step, stream); });
}

void launch_ddts_step(const DdtsStep& a, cudaStream_t stream) {
  with_tile(a.key_dim, a.rows, [&](auto keys, auto columns) {
    dim3 grid(blocks_for(a.value_dim, columns), static_cast<unsigned>(a.rows));
    launch_started(ddts_step_kernel<keys, columns>, grid, kStepThreads, 0, stream, a);
  });
}

void launch_mixer_state(const MixerStep& a, cudaStream_t stream) {
  with_tile(a.key_dim, a.rows, [&](auto keys, auto columns) {
    dim3 grid(blocks_for(a.value_dim, columns), static_cast<unsigned>(a.rows));
    launch_started(mixer_step_kernel<keys, columns>, grid, kStepThreads, 0, stream, a);
  });
}

void launch_mixer_step(const MixerStep& a, cudaStream_t stream) {
  launch_mixer_state(a, stream);
  unsigned parts = blocks_for(a.value_dim, step_columns(a.rows));
  dim3 grid(blocks_for(a.value_dim, kStepThreads), static_cast<unsigned>(a.rows));
  launch_started(mixer_norm_kernel, grid, kStepThreads, 0, stream, a, static_cast<int>(parts));
}

void launch_conv_step(const ConvStep& a, cudaStream_t stream) {
  dim3 grid(blocks_for(a.channels, kRowThreads), static_cast<unsigned>(a.rows));
  if (a.x.type == Type::kFloat32)
    launch_started(conv_step_kernel<float>, grid, kRowThreads, 0, stream, a);
  else
    launch_started(conv_step_kernel<__nv_bfloat16>, grid, kRowThreads, 0, stream, a);
}

void launch_linear(const Linear& a, cudaStream_t stream) {
  StepLinear step;
  step.layers[0] = {a.x, a.weight, a.bias, a.y, a.outputs};
  step.rows = a.rows, step.inputs = a.inputs;
  fits_step_linear(step) ? launch_step_linear(step, stream) : launch_linear_rows<1>(a, stream);
}

void launch_step_linear(const StepLinear& a, cudaStream_t stream) {
  StepLinearLaunch how = step_linear_launch(a, multiprocessors());
  if (how.scaled)
    how.scaled == 1 ? launch_step_linear_of<8, 2, 4, 1>(a, how, stream)
                    : launch_step_linear_of<8, 2, 4, kMaxRows>(a, how, stream);
  else if (how.warps == 16)
    how.blocks == 1 ? launch_step_linear_of<16, 4, 1, 0>(a, how, stream)
                    : launch_step_linear_of<16, 2, 2, 0>(a, how, stream);
  else
    how.blocks == 2 ? launch_step_linear_of<8, 4, 2, 0>(a, how, stream)
                    : launch_step_linear_of<8, 2, 4, 0>(a, how, stream);
}

void launch_attention_step(const AttentionStep& a, cudaStream_t stream) {
  if (a.int8_values)
    a.cache.type == Type::kFloat32 ? launch_attention_of<float, true>(a, stream)
                                   : launch_attention_of<__nv_bfloat16, true>(a, stream);
  else
    a.cache.type == Type::kFloat32 ? launch_attention_of<float, false>(a, stream)
                                   : launch_attention_of<__nv_bfloat16, false>(a, stream);
}

void launch_norm(const Norm& a, cudaStream_t stream) {
  launch_started(norm_kernel, dim3(static_cast<unsigned>(a.rows)), kRowThreads, 0, stream, a);
}

}  // namespace rodimus
