// Enough of CUDA's language to run the kernels of csrc/cuda on a CPU, one block at a time: every
// thread of a block is a fiber, and __syncthreads and the warp shuffle switch to the next one. The
// kernels are included as they stand; this file takes the place of the toolkit's header.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

static dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

constexpr int kStack = 64 * 1024;
constexpr unsigned kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  // barriers passed: a thread may pass the next one when no thread is behind it
  unsigned block_barriers, warp_barriers;
  float lane_value;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static void (*body)(void*);
static void* argument;

inline void resume_here() {
  unsigned me = threadIdx.x;
  swapcontext(&fibers[me].context, &scheduler);
  threadIdx.x = me;
}

// Wait until every thread in [first, last) that has not ended is as far as this one.
inline void wait(unsigned Fiber::*passed, unsigned first, unsigned last) {
  unsigned mine = ++(fibers[threadIdx.x].*passed);
  for (bool behind = true; behind;) {
    behind = false;
    for (unsigned t = first; t < last; ++t)
      if (!fibers[t].done && fibers[t].*passed < mine) behind = true;
    if (behind) resume_here();
  }
}

inline void enter() {
  body(argument);
  fibers[threadIdx.x].done = true;
}

inline void run_block() {
  for (unsigned t = 0; t < blockDim.x; ++t) {
    Fiber& fiber = fibers[t];
    fiber.stack.resize(kStack);
    fiber.done = false;
    fiber.block_barriers = fiber.warp_barriers = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned t = 0; t < blockDim.x; ++t) {
      if (fibers[t].done) continue;
      running = true;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
    }
  }
}

// kernel<<<grid, threads>>>(arguments) with a callable in place of the kernel.
template <class Call>
void launch(dim3 grid, unsigned threads, const Call& call) {
  gridDim = grid, blockDim = dim3(threads);
  if (fibers.size() < threads) fibers.resize(threads);
  body = [](void* c) { (*static_cast<const Call*>(c))(); };
  argument = const_cast<void*>(static_cast<const void*>(&call));
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(&emulator::Fiber::block_barriers, 0, blockDim.x); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  unsigned me = threadIdx.x, first = me / emulator::kWarp * emulator::kWarp;
  emulator::fibers[me].lane_value = x;
  emulator::wait(&emulator::Fiber::warp_barriers, first, first + emulator::kWarp);
  float other = emulator::fibers[me ^ mask].lane_value;
  // nobody may offer the next value before all have read this one
  emulator::wait(&emulator::Fiber::warp_barriers, first, first + emulator::kWarp);
  return other;
}
