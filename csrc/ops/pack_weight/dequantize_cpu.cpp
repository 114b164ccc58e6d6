#include <cstring>

#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "dequantize.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kPairWords = 16, kInt4Groups = 4, kInt4GroupBytes = 64;  // 16 columns; a group of pairs of one half

// bf16 of n - 15/2 for n = 0 to 15, then of the same times the square root of two.
constexpr uint16_t kInt4Levels[2 * 16] = {0xc0f0, 0xc0d0, 0xc0b0, 0xc090, 0xc060, 0xc020, 0xbfc0, 0xbf00,
                                          0x3f00, 0x3fc0, 0x4020, 0x4060, 0x4090, 0x40b0, 0x40d0, 0x40f0,
                                          0xc12a, 0xc113, 0xc0f9, 0xc0cc, 0xc09e, 0xc062, 0xc008, 0xbf35,
                                          0x3f35, 0x4008, 0x4062, 0x409e, 0x40cc, 0x40f9, 0x4113, 0x412a};

// ---- plain loops

MIXTRAL_INLINE void int8_steps(const int8_t* values, const float* row_scales, int64_t steps, BFloat16* out) {
  float scales[2][kStepDepth];  // of the two words of each column's pair
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t e = 0; e < kStepDepth; ++e) scales[half][e] = row_scales[half * kPairWords + e / 2];
  for (int64_t p = 0; p < steps * kStepDepth; ++p)  // 16 pairs of one half, then of the other
    for (int64_t e = 0; e < kStepDepth; ++e)
      out[p * kStepDepth + e] =
          from_float<BFloat16>(static_cast<float>(values[p * kStepDepth + e]) * scales[p / kPairWords % 2][e]);
}

MIXTRAL_INLINE void int4_step(const char* step, BFloat16* out) {
  const auto* scales = reinterpret_cast<const uint8_t*>(step);
  for (int64_t half = 0; half < 2; ++half) {
    uint16_t table_row[kStepDepth], exponent[kStepDepth];
    for (int64_t w = 0; w < kStepDepth; ++w) {
      const int scale = scales[half * kPairWords + w / 2];
      table_row[w] = static_cast<uint16_t>(scale % 2 * 16);
      exponent[w] = static_cast<uint16_t>((scale / 2 - 64) * 128);
    }
    for (int64_t group = 0; group < kInt4Groups; ++group) {
      uint16_t words[kStepDepth];
      std::memcpy(words, step + kBlockRows + (half * kInt4Groups + group) * kInt4GroupBytes, sizeof words);
      for (int64_t i = 0; i < 4; ++i, out += kStepDepth)
        for (int64_t w = 0; w < kStepDepth; ++w) {
          const uint16_t level = kInt4Levels[table_row[w] | (words[w] >> (4 * i) & 15)];
          out[w] = BFloat16(static_cast<uint16_t>(level + exponent[w]), BFloat16::from_bits());
        }
    }
  }
}

#if defined(__x86_64__)
// ---- the same values in AVX-512: this must keep up with memory

constexpr int64_t kPrefetchBytes = 4096;  // ahead: far enough for memory, near enough for the first cache

// The scales of 16 rows, each twice: those of rows 0-7 and of rows 8-15.
struct Scales {
  __m512 low, high;
};

MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE Scales spread(__m512 rows) {
  const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return {_mm512_permutexvar_ps(low, rows), _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), rows)};
}

MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE void store_pair(BFloat16* to, __m512 low, __m512 high, const Scales& scales) {
  const __m512bh values = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scales.high), _mm512_mul_ps(low, scales.low));
  _mm512_storeu_si512(to, (__m512i)values);
}

MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE __m512 load_int8(const int8_t* values) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
}

MIXTRAL_TARGET_AVX512_BF16 void int8_steps_avx512(const int8_t* values, const float* row_scales, int64_t steps,
                                                  BFloat16* out) {
  const Scales halves[2] = {spread(_mm512_loadu_ps(row_scales)), spread(_mm512_loadu_ps(row_scales + kPairWords))};
  for (int64_t step = 0; step < steps; ++step)
    for (const Scales& scales : halves)
      for (int64_t pair = 0; pair < kPairWords; ++pair, values += kStepDepth, out += kStepDepth) {
        _mm_prefetch(values + kPrefetchBytes, _MM_HINT_T0);
        store_pair(out, load_int8(values), load_int8(values + kPairWords), scales);
      }
}

MIXTRAL_TARGET_AVX512 void int4_step_avx512(const char* step, BFloat16* out) {
  for (int64_t byte = 0; byte < kInt4StepBytes; byte += 64) _mm_prefetch(step + kPrefetchBytes + byte, _MM_HINT_T0);
  const __m512i table = _mm512_loadu_si512(kInt4Levels), nibble = _mm512_set1_epi16(15);
  for (int64_t half = 0; half < 2; ++half) {
    // The scale of a column for both words of its pair.
    __m512i scales = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(step) + half));
    scales = _mm512_or_si512(scales, _mm512_slli_epi32(scales, 16));
    const __m512i table_row = _mm512_slli_epi16(_mm512_and_si512(scales, _mm512_set1_epi16(1)), 4);
    const __m512i exponent =
        _mm512_slli_epi16(_mm512_sub_epi16(_mm512_srli_epi16(scales, 1), _mm512_set1_epi16(64)), 7);
    const char* words = step + kBlockRows + half * kInt4Groups * kInt4GroupBytes;
#pragma GCC unroll 4
    for (int64_t group = 0; group < kInt4Groups; ++group) {
      const __m512i word = _mm512_loadu_si512(words + group * kInt4GroupBytes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, out += kStepDepth) {
        constexpr int kAndOr = 0xea;  // (a & b) | c
        const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(word, 4 * i), nibble, table_row, kAndOr);
        _mm512_storeu_si512(out, _mm512_add_epi16(_mm512_permutexvar_epi16(index, table), exponent));
      }
    }
  }
}
#endif

}  // namespace

void dequantize_int8(const char* block, int64_t depth, int64_t k, int64_t steps, BFloat16* out) {
  const auto* values = reinterpret_cast<const int8_t*>(block) + k * kBlockRows;
  const auto* scales = reinterpret_cast<const float*>(block + depth * kBlockRows);
#if defined(__x86_64__)
  if (cpu_isa() >= CpuIsa::kAvx512Bf16) return int8_steps_avx512(values, scales, steps, out);
#endif
  for_cpu_isa([&] { int8_steps(values, scales, steps, out); });
}

void dequantize_int4(const char* block, int64_t k, int64_t steps, BFloat16* out) {
  for (int64_t s = 0; s < steps; ++s, out += kStepElements) {
    const char* step = block + (k / kStepDepth + s) * kInt4StepBytes;
#if defined(__x86_64__)
    if (cpu_isa() >= CpuIsa::kAvx512) {
      int4_step_avx512(step, out);
      continue;
    }
#endif
    for_cpu_isa([&] { int4_step(step, out); });
  }
}

}  // namespace mixtral
