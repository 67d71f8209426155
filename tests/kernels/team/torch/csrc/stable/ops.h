// What csrc/cpu/threads.h takes of torch, on threads of the standard library.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t members = 1;
// As inside another parallel region: one call for all tasks.
inline bool nested = false;

inline uint32_t get_num_threads() { return members; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  if (nested) return f(begin, end);
  std::vector<std::thread> others;
  for (int64_t i = begin + 1; i < end; ++i) others.emplace_back([&f, i] { f(i, i + 1); });
  f(begin, begin + 1);
  for (std::thread& other : others) other.join();
}

}  // namespace torch::stable
