// Asynchronous copies to shared memory, as late as they may be: what a thread has committed is copied
// when it waits for it, and a tile that is used too early holds what stood there before. With
// EMULATOR_EAGER as early: a tile that is overwritten too early is lost.
#pragma once

#include "cuda_bf16.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size) {
  emulator::Fiber& fiber = emulator::self();
  emulator::check_piece(to), emulator::check_piece(from);
  if (emulator::kEager)
    memcpy(to, from, size);
  else
    fiber.copies.push_back({to, from, size, fiber.groups});
}

inline void __pipeline_commit() { ++emulator::self().groups; }

// Wait until all but the last `recent` groups are there.
inline void __pipeline_wait_prior(unsigned recent) {
  emulator::Fiber& fiber = emulator::self();
  while (!fiber.copies.empty() && fiber.copies.front().group + recent < fiber.groups) {
    const emulator::Copy& copy = fiber.copies.front();
    memcpy(copy.to, copy.from, copy.size);
    fiber.copies.pop_front();
  }
}
