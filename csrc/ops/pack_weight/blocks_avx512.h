// Quantised blocks (pack_weight.h) in AVX-512 registers. Half h of a step is sixteen registers, one for each
// pair of depths: [16 columns][2] bf16, as in the rows of an AMX tile (cpu/amx.h).
#pragma once

#include "../cpu/isa.h"
#include "../cpu/matmul.h"
#include "dequantize.h"
#include "pack_weight.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace mixtral {

inline constexpr int64_t kHalfPairs = 16;
inline constexpr int64_t kPrefetchBytes = 4096;  // ahead: far enough for memory, near enough for the first cache

// Fetches half a step that is read later: the processor's own prefetchers stop at the end of a page.
template <int64_t kBytes>
MIXTRAL_INLINE void prefetch_half(const char* half) {
#pragma GCC unroll 8
  for (int64_t byte = 0; byte < kBytes; byte += 64) _mm_prefetch(half + kPrefetchBytes + byte, _MM_HINT_T0);
}

struct Int8Block {
  static constexpr int64_t kStepBytes = cpu::kStepElements, kHalfBytes = kStepBytes / 2;
  struct Half {
    const char* pairs;
    __m512 low, high;  // the scales of columns 0-7 and 8-15, each twice

    MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE static __m512 load(const char* values) {
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
    }
    MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE __m512i pair(int64_t p) const {
      const char* at = pairs + p * 32;
      return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(load(at + 16), high), _mm512_mul_ps(load(at), low));
    }
  };

  Int8Block(const char* block, int64_t depth) : steps(block), scales(block + depth * kBlockRows) {}
  MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE Half half(int64_t step, int64_t h) const {
    const char* at = steps + step * kStepBytes + h * kHalfBytes;
    prefetch_half<kHalfBytes>(at);
    const __m512 rows = _mm512_loadu_ps(scales + h * 64);
    const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    return {at, _mm512_permutexvar_ps(low, rows), _mm512_permutexvar_ps(high, rows)};
  }

  const char *steps, *scales;
};

struct Int4Block {
  static constexpr int64_t kHalfBytes = (kInt4StepBytes - kBlockRows) / 2;
  struct Half {
    const char* words;            // of four groups of four pairs
    __m512i table_row, exponent;  // of the scale of each column, for both words of its pair

    MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE __m512i pair(int64_t p) const {
      constexpr int kAndOr = 0xea;  // (a & b) | c
      const __m512i word = _mm512_loadu_si512(words + p / 4 * 64);
      const __m512i index =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(word, 4 * (p % 4)), _mm512_set1_epi16(15), table_row, kAndOr);
      return _mm512_add_epi16(_mm512_permutexvar_epi16(index, _mm512_loadu_si512(kInt4Levels)), exponent);
    }
  };

  Int4Block(const char* block, int64_t) : steps(block) {}
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE Half half(int64_t step, int64_t h) const {
    const char* at = steps + step * kInt4StepBytes;
    prefetch_half<kHalfBytes + kBlockRows>(at + h * kHalfBytes);
    __m512i scales = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + h));
    scales = _mm512_or_si512(scales, _mm512_slli_epi32(scales, 16));
    const __m512i exponents = _mm512_sub_epi16(_mm512_srli_epi16(scales, 1), _mm512_set1_epi16(64));
    return {at + kBlockRows + h * kHalfBytes, _mm512_slli_epi16(_mm512_and_si512(scales, _mm512_set1_epi16(1)), 4),
            _mm512_slli_epi16(exponents, 7)};
  }

  const char* steps;
};

}  // namespace mixtral

#endif
