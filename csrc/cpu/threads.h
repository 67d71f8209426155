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

// Positions of the ring that one task of an attention step reads.
constexpr int64_t kSplit = 256;

}  // namespace rodimus
