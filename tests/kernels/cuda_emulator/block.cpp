// A block step by the persistent kernel or by those of its parts, emulated. Reads a plan's arguments from
// standard input, as test_native_cuda.py writes them, and prints the stream and the states it leaves.
#include "cuda/block_plan.h"

#include <cstdio>
#include <deque>

#include "cuda/persistent.cuh"
#include "parts.h"

using namespace rodimus;

namespace {

template <class T>
T number() {
  T x;
  if (fread(&x, sizeof x, 1, stdin) != 1) abort();
  return x;
}

struct Array {
  std::vector<char> bytes;
  Rows rows;
  int64_t outputs;
};

// Element type (0 float32, 1 bfloat16, 2 int64), rows, columns, and the numbers.
Array& array() {
  static std::deque<Array> arrays;
  arrays.emplace_back();
  Array& a = arrays.back();
  int64_t type = number<int64_t>();
  a.outputs = number<int64_t>(), a.rows.stride = number<int64_t>();
  a.rows.type = type == 1 ? Type::kBFloat16 : Type::kFloat32;
  a.bytes.resize(a.outputs * a.rows.stride * (type == 0 ? 4 : type == 1 ? 2 : 8));
  if (!a.bytes.empty() && fread(a.bytes.data(), a.bytes.size(), 1, stdin) != 1) abort();
  a.rows.data = a.bytes.data();
  return a;
}

void print(const Array& a) { fwrite(a.bytes.data(), 1, a.bytes.size(), stdout); }

template <int STAGES>
void run(const BlockStep& step, unsigned processors) {
  SharedOf shared(persistent_shared(step, STAGES));
  auto kernel = step.mixer.key_dim <= 64 ? persistent_kernel<STAGES, 64> : persistent_kernel<STAGES, 128>;
  emulator::launch(dim3(processors), kPersistentThreads, [&] { kernel(step); }, true);
}

}  // namespace

int main() {
  // shared memory of 0 asks for the parts
  int64_t processors = number<int64_t>(), shared = number<int64_t>();
  BlockGiven given;
  given.attends = number<int64_t>();
  given.window.head_dim = number<int64_t>(), given.window.size = number<int64_t>();
  given.key_eps = number<double>(), given.norm_eps = number<double>();
  for (int i = 0; i < (given.attends ? kCount : kCountWithoutAttention); ++i) {
    Array& a = array();
    given.weights.rows[i] = a.rows;
    given.weights.outputs[i] = a.outputs, given.weights.inputs[i] = a.rows.stride;
  }
  Array &stream = array(), &taps = array(), &state = array(), *ring = nullptr;
  given.batch = stream.outputs, given.width = stream.rows.stride;
  // in place, as between two blocks
  given.stream = given.sum = stream.rows;
  given.taps = taps.bytes.data(), given.state = reinterpret_cast<float*>(state.bytes.data());
  if (given.attends) {
    ring = &array();
    given.window.ring = {ring->rows, false};
    given.window.rows = ring->outputs / given.batch;
    given.window.position = reinterpret_cast<int64_t*>(array().bytes.data());
    given.window.cos = array().rows, given.window.sin = array().rows;
    given.window.half = given.window.cos.stride;
  }
  Cut cut = {shared ? processors : 0};
  int64_t floats = BlockPlan::floats(given, cut);
  // NaN, whatever the type
  std::vector<uint32_t> memory(floats + 4, 0xffffffffu);
  auto* start = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
  emulator::share(start, floats * sizeof *start);
  for (Array* a : {&stream, &taps, &state, ring})
    if (a) emulator::share(a->bytes.data(), a->bytes.size());
  BlockStep step;
  BlockPlan(given, cut, Workspace(start, floats, given.batch, Type::kBFloat16), step);
  step.next = given.weights.rows[kFc];
  for (int i = 0; i < step.count; ++i)
    if (!(shared ? suits_step_linear(step.steps[i]) : fits_step_linear(step.steps[i])))
      return fprintf(stderr, "layer %d is not taken\n", i), 1;
  if (!shared)
    for_parts(step, [&](const StepLinear& a) { run_step_linear(a, processors); }, run_mixer_state,
              run_attention);
  switch (shared ? persistent_stages(step, shared) : -1) {
    case -1: break;
    case 6: run<6>(step, processors); break;
    case 4: run<4>(step, processors); break;
    case 2: run<2>(step, processors); break;
    default: return fprintf(stderr, "%lld bytes are too few\n", static_cast<long long>(shared)), 1;
  }
  print(stream), print(taps), print(state);
  if (ring) print(*ring);
}
