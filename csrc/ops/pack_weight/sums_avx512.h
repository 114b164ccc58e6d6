// The sums of a tile in AVX-512 registers: kRows rows and kHalves times sixteen columns, for a chain of depths.
#pragma once

#include "../cpu/isa.h"
#include "pack_weight.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace mixtral::avx512 {

template <int kRows, int kHalves>
using Sums = __m512[kRows][kHalves];

template <int kRows, int kHalves>
MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE void set_zero(Sums<kRows, kHalves>& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kHalves; ++i) sum[r][i] = _mm512_setzero_ps();
}

// Adds a chain to those before it, or to zero: [kRows, 32] of each of the blocks, two halves long.
template <int kRows, int kHalves>
MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE void add_chain(const Sums<kRows, kHalves>& sum, bool is_first, float* sums,
                                                    float* second_sums) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kHalves; ++i) {
      float* to = (i < 2 ? sums : second_sums) + r * kPanelColumns + i % 2 * 16;
      const __m512 before = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
      _mm512_storeu_ps(to, _mm512_add_ps(before, sum[r][i]));
    }
}

}  // namespace mixtral::avx512

#endif
