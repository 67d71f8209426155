// Enough of CUDA's language to run the kernels of csrc/cuda on a CPU: every thread is a fiber, and
// __syncthreads, the warp shuffle and the wait of a grid switch to the next one. The blocks of a grid
// run one after the other, or together where they wait for each other. The kernels are included as
// they stand; this file takes the place of the toolkit's header.
//
// What may happen early or late happens as late as it may, or with EMULATOR_EAGER as early: asynchronous
// copies, and what a kernel does before its turn.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <vector>

#include "races.h"
#include "stacks.h"
#include "turns.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
// shared memory whose size the launch states
#define RODIMUS_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::shared_of_block())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
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
  // the carry would make zero of the largest NaN
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

constexpr size_t kShared = 1 << 18, kMostTogether = 8;
alignas(16) static char dynamic_shared[kMostTogether * kShared];

constexpr int kStack = 64 * 1024;
constexpr unsigned kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  size_t size;
  unsigned group;
};

struct Fiber {
  Watched watched;
  Place place;
  std::vector<char> stack;
  bool done;
  // barriers passed: a thread may pass the next one when no thread is behind it
  unsigned grid_barriers, block_barriers, warp_barriers, turns;
  // of the block or warp whose first thread this is
  Order block_order, warp_order;
  dim3 thread, block;
  float lane_value;
  // operands of the lane's part of a product
  __nv_bfloat16 left[8], right[4];
  // asynchronous copies under way, and the groups of them that were committed
  std::deque<Copy> copies;
  unsigned groups;
};

static std::vector<Fiber> fibers;
// of the fibers of all blocks that run together; barriers that were passed, or threads that ended
static unsigned me, running, steps;
static Place scheduler;
static Watched main_thread;
static Order grid_order, ends;
// whether kernels start under the end of the one before
static bool under;
static void (*body)(void*);
static void* argument;

inline Fiber& self() { return fibers[me]; }
inline unsigned first_of_block() { return me - threadIdx.x; }
inline unsigned first_of_warp() { return me - threadIdx.x % kWarp; }
// A GPU reads and writes sixteen bytes only where they start on a multiple of sixteen.
inline void check_piece(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 == 0) return;
  fprintf(stderr, "sixteen bytes do not start on a multiple of 16\n");
  abort();
}
inline char* shared_of_block() { return dynamic_shared + me / blockDim.x * kShared; }

EMULATOR_UNSEEN inline void resume(unsigned fiber) {
  me = fiber, threadIdx = self().thread, blockIdx = self().block;
  watch(self().watched);
  go_on(scheduler, self().place);
}

EMULATOR_UNSEEN inline void pause() {
  Fiber& fiber = self();
  watch(main_thread);
  go_on(fiber.place, scheduler);
}

// Wait until every fiber in [first, last) that has not ended has passed so many.
EMULATOR_UNSEEN inline void wait_until(unsigned Fiber::*passed, unsigned mine, unsigned first, unsigned last) {
  for (bool behind = true; behind;) {
    behind = false;
    for (unsigned t = first; t < last && !behind; ++t)
      behind = !fibers[t].done && fibers[t].*passed < mine;
    if (behind) pause();
  }
  ++steps;
}

EMULATOR_UNSEEN inline void wait(unsigned Fiber::*passed, unsigned first, unsigned last) {
  wait_until(passed, ++(self().*passed), first, last);
}

// A barrier that also orders memory accesses; its order is that of fiber `first`.
EMULATOR_UNSEEN inline void wait_in_order(Order Fiber::*order, unsigned Fiber::*passed, unsigned first,
                                          unsigned last) {
  unsigned number = self().*passed;
  (fibers[first].*order).arrive(number);
  wait(passed, first, last);
  (fibers[first].*order).leave(number);
}

EMULATOR_UNSEEN inline void enter() {
  body(argument);
  if (under && self().turns == 0) {
    fprintf(stderr, "a thread ends without its turn\n");
    abort();
  }
  self().done = true, ++steps;
  ends.arrive(0);
  pause();
}

// Run blocks `first` to first + count of a grid together.
EMULATOR_UNSEEN inline void run_blocks(unsigned first, unsigned count) {
  running = count * blockDim.x;
  if (fibers.size() < running) fibers.resize(running);
  main_thread = watched_now();
  for (unsigned t = 0; t < running; ++t) {
    Fiber& fiber = fibers[t];
    unsigned block = first + t / blockDim.x;
    fiber.thread = dim3(t % blockDim.x);
    fiber.block = dim3(block % gridDim.x, block / gridDim.x);
    fiber.stack.resize(kStack);
    fiber.done = false;
    fiber.grid_barriers = fiber.block_barriers = fiber.warp_barriers = fiber.turns = fiber.groups = 0;
    fiber.copies.clear();
    fiber.watched = watch_another();
    place_at(fiber.place, fiber.stack.data(), kStack, enter);
  }
  // each warp goes on until it has to wait for others, now from the first to the last, now back: who
  // should have waited and did not is far ahead
  for (bool alive = true, back = false; alive; back = !back) {
    alive = false;
    unsigned before = steps;
    for (unsigned i = 0; i < running; i += kWarp) {
      unsigned first = back ? (running - 1 - i) / kWarp * kWarp : i;
      for (unsigned last_steps = steps - 1; last_steps != steps;) {
        last_steps = steps;
        for (unsigned t = first; t < first + kWarp && t < running; ++t)
          if (!fibers[t].done) alive = true, resume(t);
      }
    }
    if (alive && steps == before) {
      fprintf(stderr, "threads wait for each other for ever\n");
      abort();
    }
  }
  ends.leave(0);
  for (unsigned t = 0; t < running; ++t) forget(fibers[t].watched);
}

// kernel<<<grid, threads>>>(arguments) with a callable in place of the kernel, under the end of the kernel
// before; together: a cooperative launch, of up to kMostTogether blocks and behind that end.
template <class Call>
void launch(dim3 grid, unsigned threads, const Call& call, bool together = false) {
  gridDim = grid, blockDim = dim3(threads);
  body = [](void* c) { (*static_cast<const Call*>(c))(); };
  argument = const_cast<void*>(static_cast<const void*>(&call));
  under = !together;
  find_written();
  if (together) return run_blocks(0, grid.x * grid.y);
  for (unsigned block = 0; block < grid.x * grid.y; ++block) {
    if (kEager) hide_written();
    run_blocks(block, 1);
  }
}

}  // namespace emulator

inline void __syncthreads() {
  using emulator::Fiber;
  unsigned first = emulator::first_of_block();
  emulator::wait_in_order(&Fiber::block_order, &Fiber::block_barriers, first, first + blockDim.x);
}

inline void __syncwarp() {
  using emulator::Fiber;
  unsigned first = emulator::first_of_warp();
  emulator::wait_in_order(&Fiber::warp_order, &Fiber::warp_barriers, first, first + emulator::kWarp);
}

// All blocks of a cooperative launch.
using GridArrival = unsigned;
EMULATOR_UNSEEN inline GridArrival arrive_at_grid() {
  __syncthreads();
  GridArrival arrival = ++emulator::self().grid_barriers;
  emulator::grid_order.arrive(arrival);
  return arrival;
}
EMULATOR_UNSEEN inline void wait_for_grid(GridArrival arrival) {
  emulator::wait_until(&emulator::Fiber::grid_barriers, arrival, 0, emulator::running);
  emulator::grid_order.leave(arrival);
}

inline void see_copies() {}

namespace emulator {

// What the thread of that number within the warp offers.
EMULATOR_UNSEEN inline float exchange(float x, unsigned lane) {
  unsigned first = first_of_warp();
  self().lane_value = x;
  wait(&Fiber::warp_barriers, first, first + kWarp);
  float other = fibers[first + lane].lane_value;
  // nobody may offer the next value before all have read this one
  wait(&Fiber::warp_barriers, first, first + kWarp);
  return other;
}

}  // namespace emulator

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  return emulator::exchange(x, (threadIdx.x ^ mask) % emulator::kWarp);
}

inline uint32_t __shfl_xor_sync(unsigned lanes, uint32_t x, int mask) {
  float carried;
  memcpy(&carried, &x, sizeof x);
  carried = __shfl_xor_sync(lanes, carried, mask);
  memcpy(&x, &carried, sizeof x);
  return x;
}

// From a lane of the thread's own section of `width` lanes.
inline float __shfl_sync(unsigned, float x, int lane, int width = emulator::kWarp) {
  unsigned first = threadIdx.x % emulator::kWarp / width * width;
  return emulator::exchange(x, first + lane % width);
}

// Late, a thread goes on at once: the kernel before has ended. Early, it waits for the rest of its block, so
// that all of them see memory as it was.
EMULATOR_UNSEEN inline void take_turn() {
  unsigned first = emulator::first_of_block();
  if (!emulator::kEager) return static_cast<void>(++emulator::self().turns);
  emulator::wait(&emulator::Fiber::turns, first, first + blockDim.x);
  emulator::show_written();
}

// Reads what it would bring nearer, so that a sanitizer sees where it ends.
EMULATOR_UNSEEN inline void prefetch(const void* from, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) abort();
  volatile char sum = 0;
  for (uint32_t i = 0; i < bytes; ++i) sum = sum + static_cast<const char*>(from)[i];
}

inline uint4 load_once(const void* from) {
  emulator::check_piece(from);
  return *static_cast<const uint4*>(from);
}

inline void store_together(float* to, float4 x) {
  emulator::check_piece(to);
  *reinterpret_cast<float4*>(to) = x;
}

// mma.sync.m16n8k16, as common.cuh describes it.
EMULATOR_UNSEEN inline void multiply_16x8x16(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                             uint32_t b0, uint32_t b1) {
  unsigned me = emulator::me, first = emulator::first_of_warp(), lane = me - first;
  const uint32_t left[4] = {a0, a1, a2, a3}, right[2] = {b0, b1};
  memcpy(emulator::fibers[me].left, left, sizeof left);
  memcpy(emulator::fibers[me].right, right, sizeof right);
  emulator::wait(&emulator::Fiber::warp_barriers, first, first + emulator::kWarp);
  for (int i = 0; i < 4; ++i) {
    unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      unsigned quad = k % 8 / 2, odd = k % 2, upper = k / 8;
      const auto& a = emulator::fibers[first + row % 8 * 4 + quad].left;
      const auto& b = emulator::fibers[first + column * 4 + quad].right;
      sum[i] += __bfloat162float(a[4 * upper + 2 * (row / 8) + odd]) *
                __bfloat162float(b[2 * upper + odd]);
    }
  }
  emulator::wait(&emulator::Fiber::warp_barriers, first, first + emulator::kWarp);
}
