// Which instruction set the kernels use: the best one of the build that this processor has.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace rodimus {

#define RODIMUS_DECLARE(isa) \
  namespace isa {            \
  extern const Kernels table; \
  }
RODIMUS_DECLARE(portable)
RODIMUS_DECLARE(avx2)
RODIMUS_DECLARE(avx512)
RODIMUS_DECLARE(avx512bf16)
#undef RODIMUS_DECLARE

namespace {

std::atomic<const Kernels*> chosen{nullptr};

// The table of a set, or null when the build or the processor lacks it.
const Kernels* usable(const char* name) {
#if defined(RODIMUS_HAS_avx512bf16)
  if (!std::strcmp(name, "avx512bf16") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return &avx512bf16::table;
#endif
#if defined(RODIMUS_HAS_avx512)
  if (!std::strcmp(name, "avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return &avx512::table;
#endif
#if defined(RODIMUS_HAS_avx2)
  if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &avx2::table;
#endif
  return std::strcmp(name, "portable") ? nullptr : &portable::table;
}

const Kernels* best() {
  for (const char* name : {"avx512bf16", "avx512", "avx2"})
    if (const Kernels* table = usable(name)) return table;
  return &portable::table;
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (!table) {
    table = best();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

}  // namespace rodimus

// The instruction set in use.
extern "C" __attribute__((visibility("default"))) const char* rodimus_cpu_isa() {
  return rodimus::kernels().name;
}

// Use another one; 0 and no change when the build or the processor lacks it.
extern "C" __attribute__((visibility("default"))) int rodimus_cpu_select_isa(const char* name) {
  const rodimus::Kernels* table = rodimus::usable(name);
  if (table) rodimus::chosen.store(table, std::memory_order_release);
  return table != nullptr;
}
