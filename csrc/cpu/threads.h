// How the operators share work over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

namespace rodimus {

using torch::stable::parallel_for;

// Numbers a thread should touch at least; below that, waking it costs more than it helps.
constexpr int64_t kWorthAThread = 16384;

inline int64_t grain(int64_t numbers_per_task) {
  int64_t tasks = kWorthAThread / (numbers_per_task > 0 ? numbers_per_task : 1);
  return tasks > 1 ? tasks : 1;
}

// Parts of a window, each a task: at most 256 positions, and from three parts on a multiple of eight, so
// that threads share them evenly.
constexpr int64_t window_splits(int64_t positions) {
  int64_t parts = (positions + 255) / 256;
  return parts > 2 ? (parts + 7) / 8 * 8 : parts;
}

}  // namespace rodimus
