#include "isa.h"

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mixtral::cpu {
namespace {

constexpr std::array<const char*, 5> kNames = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Whether the processor has AMX with bf16 and the kernel lets this process use its tile registers (Linux:
// Documentation/arch/x86/xstate.rst).
bool can_use_amx() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // leaf 7, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

CpuIsa best_isa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("x86-64-v3")) return CpuIsa::kBaseline;
  if (!__builtin_cpu_supports("x86-64-v4")) return CpuIsa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return CpuIsa::kAvx512;
  return can_use_amx() ? CpuIsa::kAmx : CpuIsa::kAvx512Bf16;
}

// On Intel's cores VDPBF16PS does the work of two f32 multiply-adds in the time of four, so it is used there only on
// request.
CpuIsa default_isa(CpuIsa best) {
  return best == CpuIsa::kAvx512Bf16 && __builtin_cpu_is("intel") ? CpuIsa::kAvx512 : best;
}
#else
CpuIsa best_isa() { return CpuIsa::kBaseline; }
CpuIsa default_isa(CpuIsa best) { return best; }
#endif

CpuIsa chosen_isa() {
  const CpuIsa best = best_isa();
  const char* name = std::getenv("MIXTRAL_CPU_ISA");
  if (name == nullptr || *name == '\0') return default_isa(best);
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (std::string(name) != kNames[i]) continue;
    if (static_cast<CpuIsa>(i) <= best) return static_cast<CpuIsa>(i);
    throw std::runtime_error(std::string("MIXTRAL_CPU_ISA: must be one that this processor has, up to ") +
                             kNames[static_cast<size_t>(best)] + ", got " + name);
  }
  throw std::runtime_error(std::string("MIXTRAL_CPU_ISA: must be baseline, avx2, avx512, avx512_bf16 or amx, got ") +
                           name);
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = chosen_isa();
  return isa;
}

}  // namespace mixtral::cpu
