// Quantised blocks (pack_weight.h) in AVX-512 registers. Half h of a step is sixteen registers, one for each
// pair of depths: [16 columns][2] bf16, as in the rows of an AMX tile (cpu/amx.h).
#pragma once

#include "../cpu/isa.h"
#include "../cpu/matmul.h"
#include "../cpu/prefetch.h"
#include "dequantize.h"
#include "pack_weight.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace mixtral {

inline constexpr int64_t kHalfPairs = 16;

// The values are q * 2^16.
struct Int8Block {
  static constexpr int64_t kStepBytes = kStepElements, kHalfBytes = kStepBytes / 2;
  struct Half {
    const char* pairs;

    // The sixteen columns at the even and at the odd depth of pair p, which is 32 bits: q in the upper 16, zeros below.
    MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE __m512 even(int64_t p) const {
      return _mm512_cvtepi32_ps(_mm512_slli_epi32(words(p), 16));
    }
    MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE __m512 odd(int64_t p) const {
      return _mm512_cvtepi32_ps(_mm512_and_si512(words(p), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }

    // All pairs.
    MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE void store(cpu::BFloat16* to) const {
#pragma GCC unroll 16
      for (int64_t p = 0; p < kHalfPairs; ++p) {
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even(p)), 16);
        _mm512_storeu_si512(to + p * 32, _mm512_or_si512(low, _mm512_castps_si512(odd(p))));
      }
    }

   private:
    MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE __m512i words(int64_t p) const {
      return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs + p * 32)));
    }
  };

  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE Half half(int64_t step, int64_t h) const {
    const char* at = steps + step * kStepBytes + h * kHalfBytes;
    cpu::prefetch_ahead<kHalfBytes>(at);
    return {at};
  }

  const char* steps;
};

struct Int4Block {
  static constexpr int64_t kHalfBytes = (kInt4StepBytes - kBlockRows) / 2;
  struct Half {
    const char* words;  // of four groups of four pairs
    __m512i scales;     // of each column, in all four bytes

    // All pairs. A look-up uses the lowest five bits of its index. With the lowest bit of the scale in front of every
    // second nibble, one shift brings each of the others into place.
    MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE void store(cpu::BFloat16* to) const {
      constexpr int kSelect = 0xca;  // a ? b : c
      const __m512i nibble = _mm512_set1_epi8(15), table_row = _mm512_slli_epi32(scales, 4);
#pragma GCC unroll 4
      for (int64_t group = 0; group < 4; ++group, to += 4 * 32) {
        const __m512i word = _mm512_loadu_si512(words + group * 64);
        const __m512i even = _mm512_ternarylogic_epi32(nibble, word, table_row, kSelect);
        const __m512i odd = _mm512_ternarylogic_epi32(nibble, _mm512_srli_epi32(word, 4), table_row, kSelect);
        _mm512_storeu_si512(to, values(even));
        _mm512_storeu_si512(to + 32, values(odd));
        _mm512_storeu_si512(to + 64, values(_mm512_srli_epi16(even, 8)));
        _mm512_storeu_si512(to + 96, values(_mm512_srli_epi16(odd, 8)));
      }
    }

   private:
    MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE __m512i values(__m512i index) const {
      const __m512i powers = _mm512_sub_epi16(_mm512_srli_epi16(scales, 9), _mm512_set1_epi16(64));
      return _mm512_add_epi16(_mm512_permutexvar_epi16(index, _mm512_loadu_si512(kInt4Levels)),
                              _mm512_slli_epi16(powers, 7));
    }
  };

  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE Half half(int64_t step, int64_t h) const {
    const char* at = steps + step * kInt4StepBytes;
    cpu::prefetch_ahead<kHalfBytes + kBlockRows>(at + h * kHalfBytes);
    const __m512i four_times =
        _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
                         0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
    const __m128i scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + h);
    return {at + kBlockRows + h * kHalfBytes, _mm512_shuffle_epi8(_mm512_broadcast_i32x4(scales), four_times)};
  }

  const char* steps;
};

}  // namespace mixtral

#endif
