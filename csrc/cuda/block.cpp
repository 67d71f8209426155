// One token through the blocks of the model: in ten kernels per block, where operations between the
// linear layers are part of the layers' kernels, or in one. For bfloat16 weights and up to eight
// rows of x; more rows are left to torch's own products.
#include "../block.h"
#include "block_plan.h"
#include "launch.h"

namespace rodimus {
namespace {

BlockGiven given_of(const BlockArguments& block, const Tensor& stream, int64_t head_dim,
                    double key_eps, double norm_eps) {
  BlockGiven given;
  const std::vector<Tensor>& w = block.weights;
  for (size_t i = 0; i < w.size(); ++i) {
    given.weights.rows[i] = rows_of("weight", w[i], stream);
    given.weights.outputs[i] = w[i].size(0);
    given.weights.inputs[i] = w[i].dim() == 2 ? w[i].size(1) : 0;
  }
  given.taps = block.taps.data_ptr(), given.state = static_cast<float*>(block.state.data_ptr());
  given.batch = stream.size(0), given.width = stream.size(1);
  given.key_eps = static_cast<float>(key_eps), given.norm_eps = static_cast<float>(norm_eps);
  given.attends = block.window.has_value();
  check_keys(w[kMemGate].size(0) / 2);
  if (!given.attends) return given;
  given.window = *block.window;
  STD_TORCH_CHECK(head_dim <= kMaxHeadDim, "heads of at most ", kMaxHeadDim,
                  " channels are expected, got ", head_dim);
  STD_TORCH_CHECK(given.window.half % kHalfTile == 0 && (!given.window.half || head_dim % kTile == 0),
                  "rotary tables of a multiple of ", kHalfTile, " and heads of a multiple of ", kTile,
                  " are expected, got ", given.window.half, " and ", head_dim);
  return given;
}

void check_fits(const BlockStep& step, bool persistent) {
  for (int i = 0; i < step.count; ++i) {
    const StepLinear& a = step.steps[i];
    STD_TORCH_CHECK(persistent ? suits_step_linear(a) : fits_step_linear(a),
                    "blocks_step on CUDA takes bfloat16 weights whose rows start on 16 bytes and hold"
                    " whole ones, and a stream alike; got ", a.inputs, " inputs and ",
                    a.layers[0].outputs, " outputs");
  }
  if (!persistent) return;
  STD_TORCH_CHECK(step.count < BlockStep::kSteps || fits_persistent(step.attention),
                  "blocks_step(impl='persistent') takes a plain ring, one key head and an even"
                  " number up to 32 of query heads of ", kHeadDim, " channels; got ", step.attention.key_heads,
                  " and ", step.attention.heads, " heads of ", step.attention.key_dim);
  STD_TORCH_CHECK(persistent_stages(step, cooperative_shared()), "blocks_step(impl='persistent') needs"
                  " a GPU with cooperative launches and ", persistent_shared(step, 2),
                  " bytes of shared memory for a block");
}

Tensor blocks_step(const Tensor& stream, const std::vector<Tensor>& weights,
                   const std::vector<Tensor>& scales, const std::vector<Tensor>& taps,
                   const std::vector<Tensor>& states, const std::vector<Tensor>& rings,
                   const OptionalTensor& position, const OptionalTensor& cos,
                   const OptionalTensor& sin, int64_t window_size, int64_t head_dim,
                   double key_eps, double norm_eps, bool persistent) {
  int64_t batch = stream.size(0), width = stream.size(1), floats = 0;
  std::vector<BlockGiven> blocks;
  for (const BlockArguments& block : block_arguments(stream, weights, scales, taps, states, rings,
                                                     position, cos, sin, window_size, head_dim))
    blocks.push_back(given_of(block, stream, head_dim, key_eps, norm_eps));
  Tensor result = output_like(stream, {batch, width}, stream.scalar_type());
  on_stream(stream, [&](cudaStream_t queue) {
    Cut cut;
    if (persistent) cut.processors = multiprocessors();
    for (const BlockGiven& given : blocks)
      floats = std::max(floats, BlockPlan::floats(given, cut) + batch * width);
    Tensor memory = output_like(stream, {floats}, ScalarType::Float);
    Rows start = rows_of("stream", stream, stream), last = output_rows(result);
    std::vector<BlockStep> steps(blocks.size());
    for (size_t i = 0; i < blocks.size(); ++i) {
      // no kernel writes before the previous one has ended, so all blocks can share the memory
      Workspace work(static_cast<float*>(memory.data_ptr()), floats, batch, Type::kBFloat16);
      // at the same place for all blocks; they alternate, so none writes the stream that it reads
      Rows between = work.rows(width, last.type);
      blocks[i].stream = start, blocks[i].sum = start = (blocks.size() - i) % 2 ? last : between;
      BlockPlan(blocks[i], cut, work, steps[i]);
      check_fits(steps[i], persistent);
    }
    for (size_t i = 1; i < steps.size(); ++i)
      if (blocks[i].weights.outputs[kFc] == blocks[i - 1].weights.outputs[kFc])
        steps[i - 1].next = blocks[i].weights.rows[kFc];
    for (const BlockStep& step : steps)
      persistent ? launch_persistent(step, queue) : launch_block_step(step, queue);
  });
  return result;
}

}  // namespace
}  // namespace rodimus

STABLE_TORCH_LIBRARY_IMPL(rodimus, CUDA, m) {
  m.impl("native_blocks_step", TORCH_BOX(&rodimus::blocks_step));
}
