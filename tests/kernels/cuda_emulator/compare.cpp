// The CUDA kernels of csrc/cuda, emulated, against the CPU kernels on the same random arguments.
// Prints a line a case: its name and the largest difference relative to the largest number.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <random>
#include <string>

#include "cpu/kernels.h"
#include "cuda/elementwise.cuh"
#include "cuda/linear.cuh"
#include "parts.h"

using namespace rodimus;

namespace {

constexpr Type kBoth[] = {Type::kFloat32, Type::kBFloat16};
std::mt19937 generator(0);
// of a case; a deque never moves them
std::deque<std::vector<float>> arrays;

float get(const Rows& a, int64_t i) {
  return a.type == Type::kFloat32 ? static_cast<float*>(a.data)[i]
                                  : __bfloat162float(static_cast<__nv_bfloat16*>(a.data)[i]);
}

float* random_floats(int64_t count) {
  std::normal_distribution<float> normal;
  arrays.emplace_back(count);
  for (float& x : arrays.back()) x = normal(generator);
  emulator::share(arrays.back().data(), count * sizeof(float));
  return arrays.back().data();
}

// Random rows; `gap` more elements stand between them than they have.
Rows random_rows(Type type, int64_t rows, int64_t size, int64_t gap = 0) {
  Rows a;
  a.type = type, a.stride = size + gap;
  a.data = random_floats(rows * a.stride);
  if (type == Type::kBFloat16) {
    auto* half = static_cast<__nv_bfloat16*>(a.data);
    // in place, front to back: each value is read before its place is overwritten
    for (int64_t i = 0; i < rows * a.stride; ++i)
      half[i] = __float2bfloat16(static_cast<float*>(a.data)[i]);
  }
  return a;
}

struct Report {
  std::string name;
  float difference = 0.0f, largest = 0.0f;

  void add(float x, float y) {
    float gap = x == y ? 0.0f : fabsf(x - y);
    difference = gap == gap ? std::max(difference, gap) : INFINITY;
    if (x - x == 0.0f) largest = std::max(largest, fabsf(x));
  }
  void add(const Rows& x, const Rows& y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) add(get(x, i), get(y, i));
  }
  // at the end of a case
  ~Report() {
    std::printf("%s %.3e\n", name.c_str(), difference / largest);
    arrays.clear(), emulator::memories.clear();
  }
};

std::string label(const char* kernel, Type type, std::initializer_list<int64_t> sizes) {
  std::string text = std::string(kernel) + (type == Type::kFloat32 ? "-float32" : "-bfloat16");
  for (int64_t size : sizes) text += "-" + std::to_string(size);
  return text;
}

template <int KEYS, int BV>
void ddts_step_case(Type type, int64_t rows, int64_t keys, int64_t values) {
  DdtsStep cpu;
  cpu.q = random_rows(type, rows, keys), cpu.k = random_rows(type, rows, keys, 3);
  cpu.v = random_rows(type, rows, values, 5), cpu.o = random_rows(type, rows, values);
  cpu.log_decay = random_rows(Type::kFloat32, rows, keys);
  auto* log_decay = static_cast<float*>(cpu.log_decay.data);
  for (int64_t i = 0; i < rows * keys; ++i) log_decay[i] = -fabsf(log_decay[i]);
  cpu.state = random_floats(rows * keys * values);
  cpu.rows = rows, cpu.key_dim = keys, cpu.value_dim = values, cpu.scale = 0.3f;
  DdtsStep cuda = cpu;
  cuda.o = random_rows(type, rows, values);
  cuda.state = random_floats(rows * keys * values);
  std::copy_n(cpu.state, rows * keys * values, cuda.state);
  kernels().ddts_step(cpu, 0, rows * blocks(values));
  emulator::launch(dim3(blocks_for(values, BV), rows), kStepThreads,
                   [&] { ddts_step_kernel<KEYS, BV>(cuda); });
  Report report{label("ddts_step", type, {KEYS, BV, rows, keys, values})};
  report.add(cpu.o, cuda.o, rows * values);
  for (int64_t i = 0; i < rows * keys * values; ++i) report.add(cpu.state[i], cuda.state[i]);
}

template <int KEYS, int BV>
void mixer_step_case(Type type, int64_t rows, int64_t keys, int64_t values, int64_t rank) {
  MixerStep cpu;
  for (Rows* a : {&cpu.q, &cpu.k}) *a = random_rows(type, rows, keys, keys);
  // one key of several is shorter than the least norm
  for (int64_t i = 0; rows > 1 && i < keys; ++i)
    set_element(cpu.k, 0, i, 1e-7f * element(cpu.k, 0, i));
  for (Rows* a : {&cpu.select, &cpu.temper}) *a = random_rows(Type::kFloat32, rows, keys, 1);
  for (int64_t i = 0; i < rows * keys; ++i) static_cast<float*>(cpu.select.data)[i] *= 30.0f;
  for (Rows* a : {&cpu.x, &cpu.shifted, &cpu.gate}) *a = random_rows(type, rows, values, values);
  cpu.gate_hidden = random_rows(type, rows, rank);
  cpu.gate_weight = random_rows(type, values, rank);
  for (Rows* a : {&cpu.gate_bias, &cpu.norm_weight}) *a = random_rows(type, 1, values);
  cpu.residual_weight = random_rows(Type::kFloat32, 1, values);
  cpu.y = random_rows(type, rows, values);
  cpu.state = random_floats(rows * keys * values);
  cpu.rows = rows, cpu.key_dim = keys, cpu.value_dim = values, cpu.gate_dim = rank;
  cpu.scale = 0.3f, cpu.key_eps = 1e-5f, cpu.norm_eps = 1e-5f;
  cpu.scratch = random_floats(mixer_scratch(cpu));
  MixerStep cuda = cpu;
  cuda.y = random_rows(type, rows, values);
  cuda.state = random_floats(rows * keys * values);
  std::copy_n(cpu.state, rows * keys * values, cuda.state);
  MixerStep part = cuda;
  part.scaled = random_rows(Type::kBFloat16, rows, values);
  part.state = random_floats(rows * keys * values);
  std::copy_n(cpu.state, rows * keys * values, part.state);
  dim3 grid(blocks_for(values, BV), rows);
  part.scratch = random_floats(rows * mixer_row(values, grid.x));
  cuda.scratch = random_floats(rows * mixer_row(values, grid.x));
  kernels().mixer_gates(cpu, 0, rows);
  kernels().mixer_step(cpu, 0, rows * blocks(values));
  kernels().mixer_norm(cpu, 0, rows);
  emulator::launch(grid, kStepThreads, [&] { mixer_step_kernel<KEYS, BV>(cuda); });
  emulator::launch(dim3(blocks_for(values, kStepThreads), rows), kStepThreads,
                   [&] { mixer_norm_kernel(cuda, grid.x); });
  emulator::launch(grid, kStepThreads, [&] { mixer_step_kernel<KEYS, BV>(part); });
  Report scaled{label("mixer_scaled", type, {KEYS, BV, rows, keys, values, rank})};
  for (int64_t m = 0; m < rows; ++m) {
    const float* parts = part.scratch + m * mixer_row(values, grid.x) + mixer_values(values);
    float squares = 0.0f;
    for (unsigned i = 0; i < grid.x; ++i) squares += parts[i];
    float factor = 1.0f / sqrtf(squares / values + part.norm_eps);
    for (int64_t j = 0; j < values; ++j)
      scaled.add(get(cpu.y, m * values + j), factor * get(part.scaled, m * values + j));
  }
  Report report{label("mixer_step", type, {KEYS, BV, rows, keys, values, rank})};
  report.add(cpu.y, cuda.y, rows * values);
  // before anything is rounded
  Report state{label("mixer_state", type, {KEYS, BV, rows, keys, values, rank})};
  for (int64_t i = 0; i < rows * keys * values; ++i) state.add(cpu.state[i], cuda.state[i]);
}

template <class T>
void conv_step_case(Type type, int64_t rows, int64_t channels, int64_t width) {
  ConvStep cpu;
  cpu.x = random_rows(type, rows, channels, channels), cpu.y = random_rows(type, rows, channels);
  cpu.weight = random_rows(type, channels, width), cpu.bias = random_rows(type, 1, channels);
  Rows state = random_rows(type, rows * channels, width), other = state;
  other.data = random_floats(rows * channels * width);
  memcpy(other.data, state.data, rows * channels * width * sizeof(T));
  cpu.state = state.data;
  cpu.rows = rows, cpu.channels = channels, cpu.width = width;
  ConvStep cuda = cpu;
  cuda.y = random_rows(type, rows, channels), cuda.state = other.data;
  kernels().conv_step(cpu, 0, rows * blocks(channels));
  emulator::launch(dim3(blocks_for(channels, kRowThreads), rows), kRowThreads,
                   [&] { conv_step_kernel<T>(cuda); });
  Report report{label("conv_step", type, {rows, channels, width})};
  report.add(cpu.y, cuda.y, rows * channels);
  report.add(state, other, rows * channels * width);
}

template <class T, int M, bool ALIGNED>
void linear_case(Type type, int64_t rows, int64_t outputs, int64_t inputs) {
  Linear cpu;
  cpu.x = random_rows(type, rows, inputs, ALIGNED ? 0 : 3);
  cpu.weight = random_rows(type, outputs, inputs), cpu.bias = random_rows(Type::kFloat32, 1, outputs);
  cpu.y = random_rows(type, rows, outputs);
  cpu.rows = rows, cpu.inputs = inputs, cpu.outputs = outputs;
  cpu.scratch = random_floats(linear_scratch(cpu));
  Linear cuda = cpu;
  cuda.y = random_rows(type, rows, outputs);
  kernels().linear_prepare(cpu);
  kernels().linear(cpu, 0, outputs);
  emulator::launch(dim3(blocks_for(outputs, kLinearWarps)), kLinearWarps * kWarp,
                   [&] { linear_kernel<T, M, ALIGNED>(cuda); });
  Report report{label("linear", type, {M, ALIGNED, rows, outputs, inputs})};
  report.add(cpu.y, cuda.y, rows * outputs);
}

void run_linear(const Rows& x, const Rows& weight, const Rows& bias, const Rows& y, int64_t rows,
                int64_t inputs, int64_t outputs) {
  Linear a;
  a.x = x, a.weight = weight, a.bias = bias, a.y = y;
  a.rows = rows, a.inputs = inputs, a.outputs = outputs;
  a.scratch = random_floats(linear_scratch(a));
  kernels().linear_prepare(a);
  kernels().linear(a, 0, outputs);
}

constexpr Type kHalf = Type::kBFloat16, kFull = Type::kFloat32;

// Three layers, of which two turn their heads, after a norm that computes its sums or is given them.
void project_case(Type stream, int64_t rows, int64_t inputs, bool given, int64_t processors) {
  const int64_t dim = 48, half = 16, outputs[] = {3 * dim, dim, 37};
  StepLinear a;
  a.count = 3, a.rows = rows, a.inputs = inputs, a.eps = 1e-3f;
  Rows x = random_rows(stream, rows, inputs, 8), normed = random_rows(kHalf, rows, inputs);
  Norm norm;
  norm.x = x, norm.weight = a.norm_weight = random_rows(kHalf, 1, inputs), norm.y = normed;
  norm.rows = rows, norm.dim = inputs, norm.eps = a.eps;
  kernels().norm(norm, 0, rows);
  if (given) {
    float* squares = random_floats(rows * 40);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = 0; i < 40; ++i) {
        squares[m * 40 + i] = 0.0f;
        for (int64_t j = i; j < inputs; j += 40)
          squares[m * 40 + i] += powf(get(x, m * x.stride + j), 2);
      }
    a.squares = squares, a.squares_stride = a.parts = 40;
    // whoever wrote the stream has multiplied it
    Rows scaled = random_rows(kHalf, rows, inputs, 8);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = 0; i < inputs; ++i)
        static_cast<__nv_bfloat16*>(scaled.data)[m * scaled.stride + i] =
            __float2bfloat16(get(x, m * x.stride + i) * get(a.norm_weight, i));
    x = scaled, a.norm_weight = {};
  }
  a.cos = random_rows(kHalf, rows, half), a.sin = random_rows(kHalf, rows, half);
  for (int64_t i = 0; i < rows * half; ++i) {
    // a rotation, so that it makes no rounding error larger
    float angle = 3.0f * get(a.cos, i);
    static_cast<__nv_bfloat16*>(a.cos.data)[i] = __float2bfloat16(cosf(angle));
    static_cast<__nv_bfloat16*>(a.sin.data)[i] = __float2bfloat16(sinf(angle));
  }
  a.rotated = 2, a.head_dim = dim, a.half = half;
  Report report{label("step_linear_norm", stream, {rows, inputs, given})};
  Rows expected[3];
  for (int i = 0; i < 3; ++i) {
    a.layers[i] = {x, random_rows(kHalf, outputs[i], inputs, 8), {},
                   random_rows(kHalf, rows, outputs[i]), outputs[i]};
    // in float32: the step rounds once, behind the rotation
    expected[i] = random_rows(kFull, rows, outputs[i]);
    run_linear(normed, a.layers[i].weight, {}, expected[i], rows, inputs, outputs[i]);
    if (i < 2) kernels().rope({expected[i], a.cos, a.sin, rows, outputs[i] / dim, dim, half}, 0, rows);
  }
  run_step_linear(a, processors);
  for (int i = 0; i < 3; ++i) report.add(expected[i], a.layers[i].y, rows * outputs[i]);
}

// The sum with the stream and its squares; the layer's input needs no norm.
void add_case(Type stream, int64_t rows, int64_t inputs, int64_t outputs, int64_t processors) {
  StepLinear a;
  a.rows = rows, a.inputs = inputs;
  Rows branch = random_rows(kHalf, rows, outputs), expected = random_rows(stream, rows, outputs);
  a.layers[0] = {random_rows(kHalf, rows, inputs), random_rows(kHalf, outputs, inputs), {}, {},
                 outputs};
  a.residual = random_rows(stream, rows, outputs), a.sum = random_rows(stream, rows, outputs);
  int64_t tiles = step_linear_tiles(a, 0);
  a.sum_squares = random_floats(rows * tiles);
  run_linear(a.layers[0].x, a.layers[0].weight, {}, branch, rows, inputs, outputs);
  kernels().add({a.residual, branch, expected, rows, outputs}, 0, rows * blocks(outputs));
  a.scaled = random_rows(kHalf, rows, outputs), a.scaled_weight = random_rows(kHalf, 1, outputs);
  run_step_linear(a, processors);
  Report scaled{label("step_linear_scaled", stream, {rows, inputs, outputs})};
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < outputs; ++n)
      scaled.add(get(a.sum, m * outputs + n) * get(a.scaled_weight, n),
                 get(a.scaled, m * outputs + n));
  Report report{label("step_linear_add", stream, {rows, inputs, outputs})};
  report.add(expected, a.sum, rows * outputs);
  Report squares{label("step_linear_squares", stream, {rows, inputs, outputs})};
  for (int64_t m = 0; m < rows; ++m) {
    float wanted = 0.0f, found = 0.0f;
    for (int64_t n = 0; n < outputs; ++n) wanted += powf(get(a.sum, m * outputs + n), 2);
    for (int64_t t = 0; t < tiles; ++t) found += a.sum_squares[m * tiles + t];
    squares.add(wanted, found);
  }
}

// The MLP's gate, and the mixer's convolution.
void gate_case(int64_t rows, int64_t inputs, int64_t inner, int64_t processors) {
  StepLinear a;
  a.rows = rows, a.inputs = inputs, a.gated = true;
  Rows expanded = random_rows(kHalf, rows, 2 * inner), expected = random_rows(kHalf, rows, inner);
  a.layers[0] = {random_rows(kHalf, rows, inputs), random_rows(kHalf, 2 * inner, inputs), {},
                 random_rows(kHalf, rows, inner), 2 * inner};
  run_linear(a.layers[0].x, a.layers[0].weight, {}, expanded, rows, inputs, 2 * inner);
  Rows gate = expanded;
  gate.data = static_cast<__nv_bfloat16*>(expanded.data) + inner;
  kernels().gate({expanded, gate, expected, rows, inner}, 0, rows * blocks(inner));
  run_step_linear(a, processors);
  Report report{label("step_linear_gate", kHalf, {rows, inputs, inner})};
  report.add(expected, a.layers[0].y, rows * inner);
}

void conv_case(int64_t rows, int64_t inputs, int64_t inner, int64_t width, int64_t processors) {
  StepLinear a;
  a.rows = rows, a.inputs = inputs;
  Rows expanded = random_rows(kHalf, rows, 2 * inner);
  a.layers[0] = {random_rows(kHalf, rows, inputs), random_rows(kHalf, 2 * inner, inputs),
                 random_rows(kFull, 1, 2 * inner), random_rows(kHalf, rows, 2 * inner), 2 * inner};
  ConvStep conv;
  conv.x = expanded, conv.y = random_rows(kHalf, rows, inner);
  conv.weight = random_rows(kHalf, inner, width), conv.bias = random_rows(kHalf, 1, inner);
  Rows taps = random_rows(kHalf, rows * inner, width), other = taps;
  other.data = random_floats(rows * inner * width);
  memcpy(other.data, taps.data, rows * inner * width * 2);
  conv.state = taps.data, conv.rows = rows, conv.channels = inner, conv.width = width;
  a.conv = conv, a.conv.state = other.data, a.conv.y = random_rows(kHalf, rows, inner);
  run_linear(a.layers[0].x, a.layers[0].weight, a.layers[0].bias, expanded, rows, inputs, 2 * inner);
  kernels().conv_step(conv, 0, rows * blocks(inner));
  run_step_linear(a, processors);
  Report report{label("step_linear_conv", kHalf, {rows, inputs, inner, width})};
  report.add(expanded, a.layers[0].y, rows * 2 * inner);
  report.add(conv.y, a.conv.y, rows * inner);
  report.add(taps, other, rows * inner * width);
}

void norm_case(Type type, int kind, int64_t rows, int64_t dim) {
  Norm cpu;
  cpu.x = random_rows(type, rows, dim, 2), cpu.weight = random_rows(type, 1, dim);
  cpu.y = random_rows(type, rows, dim);
  cpu.rows = rows, cpu.dim = dim, cpu.eps = 1e-3f;
  if (kind > 0) cpu.residual = random_rows(type, rows, dim);
  if (kind == 1) cpu.sum = random_rows(type, rows, dim);
  if (kind == 2) {
    cpu.gate = random_rows(type, rows, dim);
    cpu.residual_weight = random_rows(Type::kFloat32, 1, dim);
  }
  Norm cuda = cpu;
  cuda.y = random_rows(type, rows, dim);
  if (kind == 1) cuda.sum = random_rows(type, rows, dim);
  kernels().norm(cpu, 0, rows);
  emulator::launch(dim3(rows), kRowThreads, [&] { norm_kernel(cuda); });
  Report report{label("norm", type, {kind, rows, dim})};
  report.add(cpu.y, cuda.y, rows * dim);
  if (kind == 1) report.add(cpu.sum, cuda.sum, rows * dim);
}

struct Heads {
  int64_t query, key, value, key_dim, value_dim;
};

// Sequences of different ages against rings that hold numbers everywhere: a row of no token would
// be seen. One part, and several, of which the youngest sequence leaves some empty.
template <class T, bool INT8, class Launch>
void attention_case(const char* name, Type type, Heads heads, int64_t steps, int64_t window,
                    int64_t ring, int64_t parts, std::vector<int64_t> ages, const Launch& kernel) {
  AttentionStep cpu;
  cpu.batch = static_cast<int64_t>(ages.size()), cpu.steps = steps, cpu.ring = ring;
  cpu.heads = heads.query, cpu.key_heads = heads.key, cpu.value_heads = heads.value;
  cpu.key_dim = heads.key_dim, cpu.value_dim = heads.value_dim;
  cpu.window = window, cpu.scale = 0.11f, cpu.position = ages.data();
  int64_t tokens = cpu.batch * steps, size = heads.query * heads.value_dim;
  int64_t row = heads.key * heads.key_dim + heads.value * heads.value_dim;
  cpu.q = random_rows(type, tokens, heads.query * heads.key_dim);
  cpu.k = random_rows(type, tokens, heads.key * heads.key_dim);
  cpu.v = random_rows(type, tokens, heads.value * heads.value_dim);
  Int8Row at = int8_row(heads.key * heads.key_dim * sizeof(T), heads.value, heads.value_dim);
  if (INT8) row = at.bytes / sizeof(T);
  cpu.o = random_rows(type, tokens, size), cpu.cache = random_rows(type, cpu.batch * ring, row);
  cpu.int8_values = INT8;
  char* bytes = static_cast<char*>(cpu.cache.data);
  for (int64_t i = 0; INT8 && i < cpu.batch * ring; ++i, bytes += at.bytes) {
    for (int64_t j = at.values_at; j < at.bytes; ++j) bytes[j] = static_cast<char>(generator() % 255 - 127);
    for (int64_t h = 0; h < heads.value; ++h)
      reinterpret_cast<__nv_bfloat16*>(bytes + at.scales_at)[h] =
          __float2bfloat16(0.01f * (1 + generator() % 8));
  }
  // infinite for every key, so is the result, and no key counts that is not there
  for (int64_t i = 0; !INT8 && i < cpu.batch * ring; ++i)
    set_element(cpu.cache, i, heads.key * heads.key_dim, INFINITY);
  for (int64_t i = 0; !INT8 && i < tokens; ++i) set_element(cpu.v, i, 0, INFINITY);
  cpu.scratch = random_floats(attention_scratch(cpu, 3));
  AttentionStep cuda = cpu;
  cuda.o = random_rows(type, tokens, size), cuda.cache = random_rows(type, cpu.batch * ring, row);
  memcpy(cuda.cache.data, cpu.cache.data, cpu.batch * ring * row * sizeof(T));
  cuda.scratch = random_floats(parts * tokens * cpu.heads * (cpu.value_dim + 2));
  // a negative position, which no host can refuse in time, counts as 0
  auto* given = reinterpret_cast<int64_t*>(random_floats(2 * cpu.batch));
  for (int64_t i = 0; i < cpu.batch; ++i) given[i] = ages[i] ? ages[i] : -3;
  cuda.position = given, cuda.parts = parts;
  kernels().attention_write(cpu, 0, cpu.batch);
  kernels().attention_scan(cpu, 3, 0, cpu.batch * 3);
  kernels().attention_merge(cpu, 3, 0, tokens * cpu.heads);
  kernel(cuda, dim3(parts, tokens));
  if (parts > 1)
    emulator::launch(dim3(cpu.heads, tokens), kJoinThreads,
                     [&] { attention_join_kernel(cuda); });
  Report report{label(name, type, {heads.query, heads.value, steps, window, ring, parts})};
  report.add(cpu.o, cuda.o, tokens * size);
  if (!INT8) report.add(cpu.cache, cuda.cache, cpu.batch * ring * row);
  // to the bit, padding too
  if (memcmp(cpu.cache.data, cuda.cache.data, cpu.batch * ring * row * sizeof(T)))
    report.add(0.0f, INFINITY);
}

template <class T, bool INT8, int KEYS, int STAGES>
void attention_staged_case(Type type, int64_t heads, int64_t value_heads, int64_t steps,
                           int64_t window, int64_t ring, int64_t parts,
                           std::vector<int64_t> ages) {
  Heads all = {heads, 1, value_heads, kHeadDim, kHeadDim};
  const char* name = INT8 ? "attention_int8_staged" : "attention_staged";
  attention_case<T, INT8>(name, type, all, steps, window, ring, parts, ages,
                    [&](AttentionStep& a, dim3 grid) {
                      SharedOf shared(attention_bytes<T, INT8, KEYS, STAGES>(value_heads));
                      a.start = steps == 1 ? Start::kAhead : Start::kUnder;
                      if (steps == 1) emulator::settle(a.cache.data), emulator::settle(a.position);
                      emulator::launch(grid, static_cast<unsigned>(heads) * kHeadLanes,
                                       [&] { attention_staged_kernel<T, INT8, KEYS, STAGES, 1, kManyHeads>(a); });
                    });
}

template <class T, bool INT8>
void attention_any_case(Type type, Heads heads, int64_t steps, int64_t window, int64_t ring,
                        int64_t parts, std::vector<int64_t> ages) {
  const char* name = INT8 ? "attention_int8_any" : "attention_any";
  attention_case<T, INT8>(name, type, heads, steps, window, ring, parts, ages,
                    [&](AttentionStep& a, dim3 grid) {
                      emulator::launch(grid, kAnyThreads, [&] { attention_any_kernel<T, INT8>(a); });
                    });
}

template <class T, bool INT8>
void attention_cases_of(Type type) {
  // at an age of 46 a tile, of any size here, would pass the ring's end with its last key
  attention_staged_case<T, INT8, 8, 3>(type, 16, 16, 1, 37, 41, 1, {0, 5, 40, 41, 46, 100});
  attention_staged_case<T, INT8, 8, 3>(type, 16, 16, 2, 37, 38, 5, {0, 5, 37, 38, 70});
  attention_staged_case<T, INT8, sizeof(T) == 4 ? 2 : 4, 3>(type, 24, 24, 1, 37, 41, 3, {0, 5, 46, 100});
  attention_staged_case<T, INT8, 8, 3>(type, 24, 12, 2, 37, 38, 2, {0, 37, 70});
  attention_staged_case<T, INT8, 8, 2>(type, 4, 2, 8, 9, 16, 3, {3, 13, 31});
  attention_staged_case<T, INT8, 4, 4>(type, 2, 1, 1, 30, 32, 1, {29, 64});
  attention_any_case<T, INT8>(type, {6, 2, 3, 33, 256}, 3, 21, 23, 1, {0, 11, 22, 60});
  attention_any_case<T, INT8>(type, {3, 1, 3, 200, 7}, 1, 21, 21, 4, {1, 20, 43});
  // more parts than are joined in one round, most of them without keys
  attention_any_case<T, INT8>(type, {2, 1, 2, 16, 40}, 1, 150, 160, 70, {0, 66, 149, 400});
}

template <class T>
void cases_of(Type type) {
  ddts_step_case<64, 32>(type, 2, 64, 300);
  ddts_step_case<64, 128>(type, 5, 33, 300);
  ddts_step_case<16, 32>(type, 1, 7, 9);
  ddts_step_case<128, 128>(type, 2, 128, 128);
  mixer_step_case<64, 32>(type, 2, 64, 300, 32);
  mixer_step_case<64, 128>(type, 5, 33, 300, 7);
  mixer_step_case<16, 32>(type, 1, 7, 9, 3);
  mixer_step_case<128, 128>(type, 2, 128, 257, 16);
  conv_step_case<T>(type, 3, 300, 4);
  conv_step_case<T>(type, 1, 1, 3);
  linear_case<T, 1, true>(type, 1, 9, 2048);
  linear_case<T, 4, true>(type, 3, 5, 72);
  linear_case<T, 8, true>(type, 8, 6, 264);
  linear_case<T, 8, false>(type, 5, 7, 131);
  attention_cases_of<T, false>(type);
  attention_cases_of<T, true>(type);
  for (int kind : {0, 1, 2}) norm_case(type, kind, 3, 300), norm_case(type, kind, 1, 7);
}

}  // namespace

int main() {
  cases_of<float>(Type::kFloat32);
  cases_of<__nv_bfloat16>(Type::kBFloat16);
  for (Type stream : kBoth) {
    // one, two and more tiles for each multiprocessor; rows as wide as the models'
    project_case(stream, 1, 2048, false, 132);
    project_case(stream, 8, 2048, false, 132);
    project_case(stream, 8, 264, false, 132);
    project_case(stream, 3, 72, true, 8);
    project_case(stream, 8, 2048, true, 8);
    project_case(stream, 7, 520, true, 2);
    add_case(stream, 1, 4096, 24, 132);
    add_case(stream, 8, 4096, 40, 132);
    add_case(stream, 8, 2816, 40, 132);
    add_case(stream, 7, 6144, 24, 1);
    add_case(stream, 8, 136, 100, 4);
    add_case(stream, 5, 8, 7, 132);
  }
  gate_case(1, 2048, 16, 132), gate_case(6, 200, 21, 1), gate_case(8, 2048, 21, 1);
  conv_case(1, 2048, 16, 4, 132), conv_case(8, 136, 20, 3, 2);
}
