// The instruction sets of the CPU kernels and the one in use: the best that the processor has, or a lower one named by
// the environment variable MIXTRAL_CPU_ISA (baseline, avx2, avx512, avx512_bf16 or amx).
//
// One binary holds the kernels of all of them. A function with a target attribute may use its instructions whatever the
// compiler's flags are. The functions that it calls must be inlined into it (MIXTRAL_INLINE); otherwise they are
// compiled for the baseline.
#pragma once

#define MIXTRAL_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
// The x86-64 levels are matched by features: a model name such as skylake-avx512 would match that model alone.
#define MIXTRAL_TARGET_AVX2 __attribute__((target("arch=x86-64-v3")))
#define MIXTRAL_TARGET_AVX512 __attribute__((target("arch=x86-64-v4")))
#define MIXTRAL_TARGET_AVX512_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define MIXTRAL_TARGET_AMX __attribute__((target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")))
#endif

namespace mixtral::cpu {

enum class CpuIsa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// Throws std::runtime_error when MIXTRAL_CPU_ISA names no instruction set, or one that the processor lacks.
CpuIsa cpu_isa();

#if defined(__x86_64__)
template <typename F>
MIXTRAL_TARGET_AVX512 __attribute__((flatten, noinline)) void call_with_avx512(const F& body) {
  body();
}

template <typename F>
MIXTRAL_TARGET_AVX2 __attribute__((flatten, noinline)) void call_with_avx2(const F& body) {
  body();
}
#endif

// Calls body(), a lambda over plain loops. It is compiled once for each instruction set; the copy for the one in use
// runs.
template <typename F>
void for_cpu_isa(const F& body) {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::kAvx512) return call_with_avx512(body);
  if (isa == CpuIsa::kAvx2) return call_with_avx2(body);
#endif
  body();
}

}  // namespace mixtral::cpu
