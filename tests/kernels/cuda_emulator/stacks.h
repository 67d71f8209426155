// Going on elsewhere, on another stack, until somebody goes on here: by ucontext, whose every change is a
// system call, where a stack is used first, and from then on by jumps. Sanitizers follow only the former.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>

namespace emulator {

struct Place {
  ucontext_t context;
  jmp_buf jump;
  bool is_jump;
};

// A place where `function` is called, which must not return.
inline void place_at(Place& place, char* stack, size_t size, void (*function)()) {
  getcontext(&place.context);
  place.context.uc_stack.ss_sp = stack;
  place.context.uc_stack.ss_size = size;
  place.context.uc_link = nullptr;
  makecontext(&place.context, function, 0);
  place.is_jump = false;
}

inline void go_on(Place& from, Place& to) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.context, &to.context);
#else
  from.is_jump = true;
  if (_setjmp(from.jump)) return;
  if (to.is_jump) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

}  // namespace emulator
