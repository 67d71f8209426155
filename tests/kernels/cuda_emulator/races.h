// Races: two accesses, one of them a write, that no barrier orders. Compiled with -fsanitize=thread, every
// CUDA thread is one of the sanitizer's, which then reports them, in shared and in global memory. A shuffle
// or a product of a warp orders nothing. Blocks that run one after the other count as ordered.
#pragma once

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// for what the emulator does on behalf of a thread
#define EMULATOR_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define EMULATOR_UNSEEN
#endif

namespace emulator {

#if defined(__SANITIZE_THREAD__)
using Watched = void*;
inline Watched watch_another() { return __tsan_create_fiber(0); }
inline Watched watched_now() { return __tsan_get_current_fiber(); }
// To be called where the stack is changed.
inline void watch(Watched thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }
inline void forget(Watched thread) { __tsan_destroy_fiber(thread); }
inline void release(char* place) { __tsan_release(place); }
inline void acquire(char* place) { __tsan_acquire(place); }
#else
struct Watched {};
inline Watched watch_another() { return {}; }
inline Watched watched_now() { return {}; }
inline void watch(Watched) {}
inline void forget(Watched) {}
inline void release(char*) {}
inline void acquire(char*) {}
#endif

// What a barrier orders: accesses before arrive(n) of any thread come before those after leave(n) of any.
// Nobody arrives at n + 2 before all have left n.
struct Order {
  char places[2];

  void arrive(unsigned n) { release(places + n % 2); }
  void leave(unsigned n) { acquire(places + n % 2); }
};

}  // namespace emulator
