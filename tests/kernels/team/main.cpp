// Steps that each read what the step before has written, by teams of all kinds. Prints nothing if all is well.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "cpu/threads.h"

using rodimus::Team;
using rodimus::with_team;

constexpr int64_t kMost = 1000;

bool right(uint32_t members, bool nested) {
  torch::stable::members = members, torch::stable::nested = nested;
  std::vector<int64_t> x(kMost, 1), y(kMost), expected(kMost, 1), times(kMost);
  bool fine = true;
  for (int call = 0; call < 20; ++call)
    with_team([&](Team& team) {
      for (int64_t step = 0; step < 200; ++step) {
        int64_t total = 1 + step * 37 % kMost, chunk = 1 + step % 50;
        team.run(total, chunk, [&](int64_t begin, int64_t end) {
          for (; begin < end; ++begin) y[begin] = x[begin] + step, ++times[begin];
        });
        // the same memory in the opposite order: another thread's work of the step before
        team.run(total, chunk, [&](int64_t begin, int64_t end) {
          for (; begin < end; ++begin) x[begin] = y[total - 1 - begin] % 1009;
        });
        std::vector<int64_t> before(expected.begin(), expected.begin() + total);
        for (int64_t i = 0; i < total; ++i) {
          expected[i] = (before[total - 1 - i] + step) % 1009;
          fine = fine && x[i] == expected[i] && times[i] == 1;
          times[i] = 0;
        }
      }
    });
  return fine;
}

// An error of who leads reaches the caller, and nobody is left waiting.
bool throws(uint32_t members) {
  torch::stable::members = members, torch::stable::nested = false;
  try {
    with_team([](Team& team) {
      team.run(100, 1, [](int64_t, int64_t) {});
      throw std::runtime_error("expected");
    });
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

int main() {
  for (uint32_t members : {1, 2, 3, 8}) {
    for (bool nested : {false, true})
      if (!right(members, nested)) std::printf("wrong with %u members, nested %d\n", members, nested);
    if (!throws(members)) std::printf("no error with %u members\n", members);
  }
}
