// Fetching memory that is read once, in order, before it is needed.
#pragma once

#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

namespace mixtral::cpu {

// Fetches `kBytes` bytes that lie well behind `at`, first into the second cache: the first one has too few lines under
// way to wait for memory, and the processor's own prefetchers stop at the end of a page.
template <int64_t kBytes>
MIXTRAL_INLINE void prefetch_ahead(const void* at) {
  constexpr int64_t kFar = 16384, kNear = 2048;
#pragma GCC unroll 32
  for (int64_t byte = 0; byte < kBytes; byte += 64) {
    _mm_prefetch(static_cast<const char*>(at) + kFar + byte, _MM_HINT_T1);
    _mm_prefetch(static_cast<const char*>(at) + kNear + byte, _MM_HINT_T0);
  }
}

}  // namespace mixtral::cpu

#endif
