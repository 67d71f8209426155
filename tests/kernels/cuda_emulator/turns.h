// What a kernel sees that is started under the end of the one before it.
//
// take_turn() waits until the kernel before has ended, and only then lets the next one be started, which
// happens when all blocks have let it or ended. So what a kernel does before its turn runs beside one other
// kernel, the one just before: all older ones have ended, and what they wrote is in memory. It takes both
// the order of the two and that every thread takes its turn; who lets the next one start before its own
// wait has it run beside older kernels too. Before its turn a kernel may read nothing that the one just
// before writes, nor anything on the same line, which may stay in the first cache as it was. And as
// nobody says what that one reads, it may write nothing.
//
// With EMULATOR_EAGER all of this runs before the first store of the kernel just before: of each block,
// until its turn, the lines that kernel wrote are hidden and read as NaN.
#pragma once

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

namespace emulator {

// of the whole run, by the environment, so that a program need not be compiled for each
inline const bool kEager = getenv("EMULATOR_EAGER") != nullptr;

constexpr size_t kLine = 128;

struct Memory {
  char* data;
  // what it held at the last launch, what is seen of it before a turn, and what is kept meanwhile
  std::vector<char> before, early, kept;

  size_t size() const { return before.size(); }
};

static std::vector<Memory> memories;
static bool hidden;

// Memory that kernels write; the one before the first may have written all of it.
inline void share(void* data, size_t size) {
  memories.push_back({static_cast<char*>(data), std::vector<char>(size, '\xff')});
}

// What it holds is older than the kernel before.
inline void settle(const void* data) {
  for (Memory& m : memories)
    if (m.data == data) memcpy(m.before.data(), m.data, m.size());
}

// At a launch: find the lines that the kernel before has written.
inline void find_written() {
  for (Memory& m : memories) {
    m.early.assign(m.data, m.data + m.size());
    for (size_t i = 0; i < m.size(); i += kLine) {
      size_t size = std::min(kLine, m.size() - i);
      if (memcmp(m.data + i, &m.before[i], size)) memset(&m.early[i], 0xff, size);
    }
    m.before.assign(m.data, m.data + m.size());
  }
}

inline void hide_written() {
  for (Memory& m : memories) {
    m.kept.assign(m.data, m.data + m.size());
    memcpy(m.data, m.early.data(), m.size());
  }
  hidden = true;
}

inline void show_written() {
  if (!hidden) return;
  for (Memory& m : memories) {
    if (memcmp(m.data, m.early.data(), m.size())) {
      fprintf(stderr, "a kernel writes before its turn\n");
      abort();
    }
    memcpy(m.data, m.kept.data(), m.size());
  }
  hidden = false;
}

}  // namespace emulator
