// Which instruction sets this processor has, and which one the kernels use.
#include "isa.h"

#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

namespace gptfast {

const char* isa_name(Isa isa) {
  constexpr const char* names[kIsaCount] = {"baseline", "avx2", "avx512", "amx"};
  return names[static_cast<int>(isa)];
}

// setup.py leaves out the levels that the compiler does not know.
static bool compiled(Isa isa) {
  const std::string list = std::string(",") + GPTFAST_CPU_ISAS + ",";
  return list.find(std::string(",") + isa_name(isa) + ",") != std::string::npos;
}

#if defined(__x86_64__)

// The kernel grants the 8 KiB tile state of AMX only to processes that ask for it.
static bool request_amx() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

static bool processor_has(Isa isa) {
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c");
  static const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool amx = [] {
    unsigned a, b, c, d;
    if (!avx512 || !__builtin_cpu_supports("avx512bf16")) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
    const unsigned all = kAmxBf16 | kAmxTile | kAmxInt8;
    return (d & all) == all && request_amx();
  }();
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::amx: return amx;
  }
  return false;
}

#else

static bool processor_has(Isa isa) { return isa == Isa::baseline; }

#endif

bool isa_supported(Isa isa) { return compiled(isa) && processor_has(isa); }

static Isa best_isa() {
  for (int i = kIsaCount - 1; i > 0; --i)
    if (isa_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
  return Isa::baseline;
}

static Isa& chosen() {
  static Isa isa = best_isa();
  return isa;
}
Isa current_isa() { return chosen(); }
void set_current_isa(Isa isa) { chosen() = isa; }

}  // namespace gptfast
