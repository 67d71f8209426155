// How the operators share work over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace rodimus {

using torch::stable::parallel_for;

// Fewest numbers that are worth a thread; below that, waking it costs more than it helps.
constexpr int64_t kWorthAThread = 16384;

inline int64_t grain(int64_t numbers_per_task) {
  int64_t tasks = kWorthAThread / (numbers_per_task > 0 ? numbers_per_task : 1);
  return tasks > 1 ? tasks : 1;
}

// Rows of weights that a thread takes at a time: enough of them that they are read as one stream.
inline int64_t rows_at_a_time(int64_t numbers_per_row) { return 4 * grain(numbers_per_row); }

// The threads of one call that has many steps. One leads; it gives the others work, and never waits
// for one that has not begun: on a busy machine, or if torch runs tasks one after another, the
// leader does everything itself.
class Team {
 public:
  explicit Team(int64_t members) : parts_(members) {}

  // f(begin, end) for all of 0 .. total, `chunk` tasks at a time. Each thread has its own part,
  // which it does in order, and then helps the others.
  template <class F>
  void run(int64_t total, int64_t chunk, const F& f) {
    int64_t count = std::min<int64_t>(parts_.size(), (total + chunk - 1) / chunk);
    if (count <= 1) return f(0, total);
    for (int64_t i = 0; i < count; ++i) {
      parts_[i].next.store(total * i / count, std::memory_order_relaxed);
      parts_[i].end = total * (i + 1) / count;
    }
    count_ = count, chunk_ = chunk, context_ = &f;
    call_ = [](const void* context, int64_t begin, int64_t end) {
      (*static_cast<const F*>(context))(begin, end);
    };
    open_.store(++step_);
    work(0);
    open_.store(kClosed);
    for (Patience patience; inside_.load();) patience.wait();
  }

  // Loop of a thread that does not lead, until `finish`.
  void follow(int64_t member) {
    int64_t done = kClosed;
    for (Patience patience;;) {
      int64_t step = open_.load();
      if (step == kFinished) return;
      if (step == kClosed || step == done) {
        patience.wait();
        continue;
      }
      // the leader waits for every thread that is counted in while a step is open
      inside_.fetch_add(1);
      if (open_.load() == step) work(member), done = step;
      inside_.fetch_sub(1);
      patience = {};
    }
  }

  void finish() { open_.store(kFinished); }

 private:
  static constexpr int64_t kClosed = 0, kFinished = -1;

  // Spins for a while, then yields the core to other threads.
  struct Patience {
    int left = 1000;
    void wait() {
      if (left > 0) {
        --left;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  };

  struct alignas(64) Part {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void work(int64_t member) {
    for (int64_t i = 0; i < count_; ++i) {
      Part& part = parts_[(member + i) % count_];
      while (part.next.load(std::memory_order_relaxed) < part.end) {
        int64_t begin = part.next.fetch_add(chunk_, std::memory_order_relaxed);
        if (begin < part.end) call_(context_, begin, std::min(begin + chunk_, part.end));
      }
    }
  }

  std::vector<Part> parts_;
  int64_t count_ = 0, chunk_ = 0, step_ = 0;
  const void* context_ = nullptr;
  void (*call_)(const void*, int64_t, int64_t) = nullptr;
  alignas(64) std::atomic<int64_t> open_{kClosed};
  alignas(64) std::atomic<int64_t> inside_{0};
};

// Run lead(team) with torch's threads as the team.
template <class F>
void with_team(const F& lead) {
  int64_t members = torch::stable::get_num_threads();
  Team team(members);
  std::exception_ptr error;
  parallel_for(0, members, 1, [&](int64_t first, int64_t) {
    if (first) return team.follow(first);
    try {
      lead(team);
    } catch (...) {
      error = std::current_exception();
    }
    team.finish();
  });
  if (error) std::rethrow_exception(error);
}

// Number of parts of a window, each a task of at most 256 positions; from three on a multiple of
// eight, so that threads share the parts evenly.
constexpr int64_t window_splits(int64_t positions) {
  int64_t parts = (positions + 255) / 256;
  return parts > 2 ? (parts + 7) / 8 * 8 : parts;
}

}  // namespace rodimus
