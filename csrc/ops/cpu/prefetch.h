// Fetching memory that is read once, in order, before it is needed.
#pragma once

#include <cstdint>

#include "isa.h"

namespace mixtral::cpu {

// Prefetches `kBytes` bytes far ahead of `at` into L2, and nearer ones from there into L1. L1 has too few misses in
// flight to hide the latency of memory, and the processor's own prefetchers stop at the end of a page.
template <int64_t kBytes>
MIXTRAL_INLINE void prefetch_ahead(const void* at) {
  constexpr int64_t kFar = 16384, kNear = 2048;
#pragma GCC unroll 32
  for (int64_t byte = 0; byte < kBytes; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(at) + kFar + byte, 0, 2);
    __builtin_prefetch(static_cast<const char*>(at) + kNear + byte, 0, 3);
  }
}

// The same with one prefetch a line, into L1: for processors with AVX2 alone. On Zen 3 a prefetch into L2 takes one of
// the misses of L1 too. Memory that is read strictly in order needs none there (weight_kernels_avx2.cpp).
template <int64_t kBytes>
MIXTRAL_INLINE void prefetch_ahead_once(const void* at) {
  constexpr int64_t kNear = 4096;
#pragma GCC unroll 16
  for (int64_t byte = 0; byte < kBytes; byte += 64)
    __builtin_prefetch(static_cast<const char*>(at) + kNear + byte, 0, 3);
}

}  // namespace mixtral::cpu
