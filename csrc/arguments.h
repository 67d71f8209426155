// Arguments of the operators' kernels: raw pointers, element types, sizes.
//
// Plain C++ without torch, so the CPU kernels of every instruction set, nvcc and the emulated CUDA
// kernels of the tests include the same definitions. Rows are contiguous; `stride` is the distance
// between rows in elements, so one half of a wider projection needs no copy.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define RODIMUS_EVERYWHERE __host__ __device__
#else
#define RODIMUS_EVERYWHERE
#endif

namespace rodimus {

// Most rows of x in a linear step, and most tokens in an attention step.
constexpr int kMaxRows = 8;

// Most taps of the convolution of a sequence.
constexpr int64_t kMaxTaps = 8;

// Most channels of a head in the attention step on CUDA.
constexpr int kMaxHeadDim = 256;

// int8 and int4 are for weights of linear layers only, and only on a CPU.
enum class Type : int { kFloat32, kBFloat16, kInt8, kInt4 };

// How many 4-bit weights share a scale, and how many are packed together.
constexpr int64_t kInt4Group = 32, kInt4Unit = 128;

// What a CUDA kernel may do when it is started before the previous kernel has ended. kUnder: only
// prefetch weights into the cache that all multiprocessors share. kAhead: also read what the
// previous kernel has not written. That is for kernels that follow another one of the same step:
// everything for which that one has waited, including the weights, is in memory.
enum class Start : int { kUnder, kAhead };

struct Rows {
  void* data = nullptr;
  Type type = Type::kFloat32;
  int64_t stride = 0;

  RODIMUS_EVERYWHERE explicit operator bool() const { return data != nullptr; }
};

// Weights of a block, as in rodimus_kernels.BlockWeights; Rodimus blocks end before kAttnNorm.
enum Weight {
  kMixerNorm, kFc, kConv, kConvBias, kQueryKey, kGateIn, kGateOut, kGateBias, kMemGate, kMemBias,
  kResidual, kActNorm, kMixerOut,
  kAttnNorm, kQuery, kKey, kValue, kAttnOut, kFfnNorm, kFfnIn, kFfnOut, kCount
};
constexpr int kCountWithoutAttention = kAttnNorm;
// Matrices of linear layers. All of them in a block may be int8 or, except for kGateOut, int4.
constexpr Weight kMatrices[] = {kFc,    kQueryKey, kGateIn, kGateOut, kMemGate, kMixerOut,
                                kQuery, kKey,      kValue,  kAttnOut, kFfnIn,   kFfnOut};

// A ring [B, R, row] of keys and values, or of bytes with 8-bit values; type and stride are those of the
// keys.
struct Ring {
  Rows rows;
  bool int8_values;
};

// Rotary tables and ring of a block with attention.
struct Window {
  Ring ring;
  Rows cos, sin;
  const int64_t* position;
  int64_t rows, half, head_dim, size;
};

// One token of the recurrence for N = B * H rows; state is float32 [N, K, V], written in place.
struct DdtsStep {
  Rows q, k, log_decay;  // [N, K]
  Rows v;                // [N, V]
  Rows o;                // [N, V]
  float* state;
  int64_t rows, key_dim, value_dim;
  float scale;
};

// One token of the mixer between its projections; state is float32 [B, K, V], written in place.
struct MixerStep {
  Rows q, k, select, temper;           // [B, K], raw projections
  Rows gate_hidden;                     // [B, R], hidden layer of the input gate
  Rows x, shifted, gate;               // [B, V]
  Rows scaled;                         // [B, V] or empty; CUDA: y without the norm's factor
  Rows gate_weight;                    // [V, R]
  const void* gate_scale = nullptr;    // as in Linear, for an int8 gate_weight
  Rows gate_bias;                      // [V]
  Rows residual_weight, norm_weight;   // [V]
  Rows y;                              // [B, V]
  float* state;
  float* scratch;  // of the size that the implementation states
  int64_t rows, key_dim, value_dim, gate_dim;
  float scale, key_eps, norm_eps;
  Start start = Start::kUnder;
};

// Convolution of one token; state [B, D, W] holds the last W inputs, oldest first. All tensors have
// the same element type.
struct ConvStep {
  Rows x, y;     // [B, D]
  Rows weight;   // [D, W]
  Rows bias;     // [D] or empty
  void* state;
  int64_t rows, channels, width;
};

// Convolution of sequences of any length. The inputs before a sequence's first token are those of
// its state, or zeros; with documents, the taps of a token only see tokens of the same document.
struct Conv {
  Rows x;        // [B * T, D], with the stride between the tokens of a sequence
  Rows y;        // [B * T, D]
  int64_t sequence_stride;  // of x, in elements
  Rows weight;   // [D, W]
  Rows bias;     // [D] or empty
  const void* state = nullptr;         // [B, D, W] of x's type
  const int64_t* documents = nullptr;  // [B, T]
  int64_t batch, length, channels, width;
};

// y = x weight^T + bias for few rows; x and weight have the same element type, or weight is int8
// with a scale for each of its rows, or int4 with a scale for each group in a row.
//
// int4: a row consists of units of kInt4Unit weights in 32 words of 16 bits, the last unit padded
// with zeros. Bits 4 j to 4 j + 3 of word i are weight 32 j + i of the unit, in two's complement.
struct Linear {
  Rows x;        // [M, K]
  Rows weight;   // [N, K]; for int4 the stride is in bytes
  const void* scale = nullptr;  // int8: float32 [N]; int4: bfloat16 [N, groups in whole units]
  Rows bias;     // [N] or empty
  Rows y;        // [M, N]
  float* scratch;  // of the size that the implementation states
  int64_t rows, inputs, outputs;
};

// The three norms; which one it is follows from the pointers that are set.
//   plain: y = norm(x) * weight
//   add:   sum = x + residual, y = norm(sum) * weight
//   gated: y = norm((x + residual * residual_weight) * silu(gate)) * weight
struct Norm {
  Rows x, residual, gate;            // [N, D]
  Rows weight, residual_weight;      // [D]
  Rows sum, y;                       // [N, D]
  int64_t rows, dim;
  float eps;
};

// T <= 8 new tokens of each sequence against its ring: token p is row p % R, [Hk keys | Hv values].
// With int8_values a row is as in int8_values.h; the type and the stride are those of its keys.
struct AttentionStep {
  Rows q, k, v, o;           // [B * T, heads * dim]
  Rows cache;                // [B * R, Hk * D + Hv * Dv]
  bool int8_values = false;
  const int64_t* position;   // [B]
  float* scratch;  // of the size that the implementation states
  int64_t batch, steps, ring, heads, key_heads, value_heads, key_dim, value_dim, window;
  float scale;
  // CUDA: parts that the window is cut into
  int64_t parts = 1;
  Start start = Start::kUnder;
};

// Up to three linear layers of one step, with the operations before and after them in a block.
// bfloat16 weights; every input is [rows, inputs].
struct StepLinear {
  struct Layer {
    Rows x, weight, bias, y;
    int64_t outputs;
  };
  static constexpr int kMaxLayers = 3;
  Layer layers[kMaxLayers];
  int64_t count = 1, rows, inputs;
  Start start = Start::kUnder;
  int64_t together = 0;  // tiles that a GPU works on at once; set at the launch

  // Before: x * norm_weight / sqrt(mean(x^2) + eps), with the division after the product. If
  // norm_weight is set, the step multiplies x by it and sums the squares. Otherwise the step that
  // wrote x has multiplied it already, and left the sum of squares of each row in `parts` pieces.
  Rows norm_weight;
  const float* squares = nullptr;
  int64_t squares_stride = 0, parts = 0;
  float eps = 0.0f;

  // After, for a single layer: sum = residual + y and, if a norm follows, the sum of squares of
  // each tile of outputs, and scaled = sum * scaled_weight.
  Rows residual, sum, scaled, scaled_weight;
  float* sum_squares = nullptr;  // [rows, tiles]
  // After, for a single layer: y = silu(second half) * first half.
  bool gated = false;
  // After, for the first `rotated` layers: the rotary embedding of heads of head_dim.
  Rows cos, sin;  // [rows, half]
  int64_t rotated = 0, head_dim = 0, half = 0;
  // After, for the first conv.channels outputs of a single layer: the convolution of one token.
  ConvStep conv = {};
};

// One token through a block of the model on CUDA: its linear steps in order, the mixer's state
// update after the second, attention after the fourth. A Rodimus block ends with the third.
struct BlockStep {
  enum { kExpand, kProject, kContract, kAttend, kAttnOut, kMlpIn, kMlpOut, kSteps };
  StepLinear steps[kSteps];
  int count = 0;
  // tiles of outputs of each step, and of all steps before it
  int tiles[kSteps] = {}, before[kSteps] = {};
  MixerStep mixer = {};
  AttentionStep attention = {};
  // the first weights of the next block, if they have the shape of this block's
  Rows next;
};

// x [B, heads * dim] rotated in place: channel d < half of a head pairs with d + half.
struct Rope {
  Rows x;
  Rows cos, sin;  // [B, half]
  int64_t rows, heads, dim, half;
};

// y from two operands, element by element; y may be one of them.
struct Pairwise {
  Rows a, b, y;  // [N, D]
  int64_t rows, dim;
};

}  // namespace rodimus
