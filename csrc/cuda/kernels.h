// Launches of the CUDA kernels, for the operators: plain C++ over the runtime's stream.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "sizes.h"

namespace rodimus {

// Most keys of a state that the step kernels hold in registers.
constexpr int64_t kMaxKeys = 128;

// Columns of a state that a block updates: few while blocks are few, more when they are many.
inline int64_t step_columns(int64_t rows) { return rows <= 4 ? 32 : 128; }

// Floats of scratch memory for a mixer step whose blocks update this many columns.
inline int64_t mixer_scratch(const MixerStep& a, int64_t columns) {
  return a.rows * mixer_row(a.value_dim, (a.value_dim + columns - 1) / columns);
}

// Whether a pointer and the distance between rows suit accesses of 16 bytes.
inline bool in_pieces(const Rows& a) {
  int64_t size = a.type == Type::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && a.stride * size % 16 == 0;
}

// Whether the kernels of linear steps are written for these layers.
inline bool suits_step_linear(const StepLinear& a) {
  bool fits = a.inputs > 0 && a.inputs % 8 == 0 && a.rows <= kMaxRows;
  for (int64_t i = 0; i < a.count; ++i)
    fits = fits && a.layers[i].weight.type == Type::kBFloat16 && in_pieces(a.layers[i].weight) &&
           in_pieces(a.layers[i].x);
  return fits && (!a.norm_weight || (in_pieces(a.norm_weight) && a.squares == nullptr &&
                                    a.norm_weight.type == Type::kBFloat16)) &&
         (a.norm_weight || a.layers[0].x.type == Type::kBFloat16);
}

// Whether launch_step_linear takes these layers. The kernel with the most warps, which is chosen
// for many multiprocessors, needs the most memory.
inline bool fits_step_linear(const StepLinear& a) {
  return suits_step_linear(a) && step_linear_launch(a, int64_t{1} << 40).fits();
}

// Blocks of an attention step that fill a GPU, the fewest keys worth a part, the most parts joined
// in one round, and the keys of a part with more sequences than fit at a time: short blocks end
// more evenly. Measured on an H200: one part for 256 sequences, 4 for 64, 33 for 8.
constexpr int64_t kAttentionBlocks = 264, kShortPart = 32, kMostParts = 64, kLongPart = 256;

// Parts of the window, equal for sequences at any position, so a captured graph stays valid.
inline int64_t attention_parts(const AttentionStep& a) {
  auto lesser = [](int64_t x, int64_t y) { return x < y ? x : y; };
  int64_t tokens = a.batch * a.steps > 0 ? a.batch * a.steps : 1;
  int64_t most = lesser((a.window + kShortPart - 1) / kShortPart, kMostParts);
  int64_t parts = tokens > 2 * kAttentionBlocks ? a.window / kLongPart
                                                : lesser(kAttentionBlocks / tokens, most);
  return parts > 1 ? parts : 1;
}

// Floats of scratch memory for an attention step in this many parts.
inline int64_t attention_parts_scratch(const AttentionStep& a, int64_t parts) {
  return parts == 1 ? 0 : parts * a.batch * a.steps * a.heads * (a.value_dim + 2);
}

// Whether attention has one key head and query heads that fill half a warp each, as the staged
// kernel and the kernel of a whole block need. Both also limit the number of heads.
inline bool fits_half_warps(const AttentionStep& a) {
  bool pieces = true;
  for (const Rows& x : {a.q, a.k, a.v, a.cache, a.o})
    pieces = pieces && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  return pieces && a.key_heads == 1 && a.key_dim == kHeadDim && a.value_dim == kHeadDim &&
         a.heads % 2 == 0;
}

inline bool fits_persistent(const AttentionStep& a) {
  return fits_half_warps(a) && a.cache.type == Type::kBFloat16 && !a.int8_values &&
         a.heads * kHeadLanes <= kPersistentThreads;
}

// Run the parts of a block one after the other, each kind with its own function.
template <class Linear, class Mixer, class Attention>
void for_parts(const BlockStep& a, const Linear& linear, const Mixer& mixer,
               const Attention& attention) {
  for (int i = 0; i < a.count; ++i) {
    linear(a.steps[i]);
    if (i == BlockStep::kProject) mixer(a.mixer);
    if (i == BlockStep::kAttend) attention(a.attention);
  }
}

void launch_ddts_step(const DdtsStep& a, cudaStream_t stream);
void launch_mixer_step(const MixerStep& a, cudaStream_t stream);
// The mixer step without its norm: the norm's input stays in the scratch memory.
void launch_mixer_state(const MixerStep& a, cudaStream_t stream);
void launch_conv_step(const ConvStep& a, cudaStream_t stream);
void launch_linear(const Linear& a, cudaStream_t stream);
void launch_step_linear(const StepLinear& a, cudaStream_t stream);
void launch_attention_step(const AttentionStep& a, cudaStream_t stream);
void launch_norm(const Norm& a, cudaStream_t stream);
void launch_block_step(const BlockStep& a, cudaStream_t stream);

// Multiprocessors of the current device, and the shared memory that a block may have there in a
// cooperative launch; 0 if the device has no such launches.
int64_t multiprocessors();
int64_t cooperative_shared();
// A block in one kernel, planned for all multiprocessors; persistent_stages tells whether it fits.
void launch_persistent(const BlockStep& a, cudaStream_t stream);

}  // namespace rodimus
