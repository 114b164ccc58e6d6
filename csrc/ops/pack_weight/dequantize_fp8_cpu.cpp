#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "../cpu/transpose.h"
#include "dequantize.h"
#include "e4m3.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kRows = 16;  // of one transposition: half a step

// 32 depths of rows of e4m3 values that are `depth` apart -> out [16][32]
MIXTRAL_INLINE void widen_rows(const uint8_t* values, const float* scales, int64_t depth, BFloat16 (*out)[kStepDepth]) {
  for (int64_t j = 0; j < kRows; ++j)
    for (int64_t d = 0; d < kStepDepth; ++d) {
      const uint32_t bits = float_to_bits(from_e4m3(values[j * depth + d]) * scales[j]);  // a bf16 value
      out[j][d] = BFloat16(static_cast<uint16_t>(bits >> 16), BFloat16::from_bits());
    }
}

#if defined(__x86_64__)
// The same values. An e4m3 number has the bits of its bf16 value, shifted and with another bias of the exponent; the
// scale adds to the exponent. Subnormals are looked up.
MIXTRAL_TARGET_AVX512 void widen_rows_avx512(const uint8_t* values, const float* scales, int64_t depth,
                                             BFloat16 (*out)[kStepDepth]) {
  // Multiples of 2^-9 as bf16, from 0 to 7.
  const __m512i multiples =
      _mm512_zextsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  constexpr int32_t kBias = 127 << 7, kRebias = (127 - 7) << 7;
  for (int64_t j = 0; j < kRows; ++j) {
    const auto scale = static_cast<int16_t>((float_to_bits(scales[j]) >> 16) - kBias);
    const __m512i subnormals = _mm512_mask_add_epi16(multiples, 0xfe, multiples, _mm512_set1_epi16(scale));
    const __m512i words =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + j * depth)));
    const __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7f));
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0x80)), 8);
    __m512i bits = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(scale + kRebias));
    const __mmask32 is_subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    bits = _mm512_mask_permutexvar_epi16(bits, is_subnormal, magnitude, subnormals);
    const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
    bits = _mm512_mask_mov_epi16(bits, is_nan, _mm512_set1_epi16(0x7fc0));
    _mm512_storeu_si512(out[j], _mm512_or_si512(bits, sign));
  }
}

// Likewise, sixteen values at a time. A subnormal's two bytes are looked up by their places in the table.
MIXTRAL_TARGET_AVX2 void widen_rows_avx2(const uint8_t* values, const float* scales, int64_t depth,
                                         BFloat16 (*out)[kStepDepth]) {
  const __m256i multiples =
      _mm256_broadcastsi128_si256(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  const __m256i not_zero = _mm256_cmpgt_epi16(multiples, _mm256_setzero_si256());
  constexpr int32_t kBias = 127 << 7, kRebias = (127 - 7) << 7;
  for (int64_t j = 0; j < kRows; ++j) {
    const auto scale = static_cast<int16_t>((float_to_bits(scales[j]) >> 16) - kBias);
    const __m256i subnormals = _mm256_add_epi16(multiples, _mm256_and_si256(not_zero, _mm256_set1_epi16(scale)));
    for (int64_t d = 0; d < kStepDepth; d += 16) {
      const auto* from = reinterpret_cast<const __m128i*>(values + j * depth + d);
      const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(from));
      const __m256i magnitude = _mm256_and_si256(words, _mm256_set1_epi16(0x7f));
      const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0x80)), 8);
      __m256i bits = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 4), _mm256_set1_epi16(scale + kRebias));
      const __m256i places =
          _mm256_add_epi16(_mm256_mullo_epi16(magnitude, _mm256_set1_epi16(0x0202)), _mm256_set1_epi16(0x0100));
      const __m256i is_subnormal = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), magnitude);
      bits = _mm256_blendv_epi8(bits, _mm256_shuffle_epi8(subnormals, places), is_subnormal);
      const __m256i is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
      bits = _mm256_blendv_epi8(bits, _mm256_set1_epi16(0x7fc0), is_nan);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[j] + d), _mm256_or_si256(bits, sign));
    }
  }
}
#endif

void widen(const uint8_t* values, const float* scales, int64_t depth, BFloat16 (*out)[kStepDepth]) {
#if defined(__x86_64__)
  if (cpu_isa() >= CpuIsa::kAvx512) return widen_rows_avx512(values, scales, depth, out);
  if (cpu_isa() == CpuIsa::kAvx2) return widen_rows_avx2(values, scales, depth, out);
#endif
  widen_rows(values, scales, depth, out);
}

}  // namespace

void dequantize_fp8_half(const char* block, int64_t depth, int64_t step, int64_t steps, int64_t h, BFloat16* out) {
  constexpr int64_t kAhead = 1024;  // the processor's prefetchers do not follow sixteen rows
  const auto* values = reinterpret_cast<const uint8_t*>(block) + h * kRows * depth + step * kStepDepth;
  const auto* scales = reinterpret_cast<const float*>(block + depth * kBlockRows) + h * kRows;
  for (int64_t j = 0; j < kRows; ++j) __builtin_prefetch(values + j * depth + kAhead, 0, 2);
  BFloat16 rows[2][kRows][kStepDepth];
  for (int64_t s = 0; s < steps; ++s) widen(values + s * kStepDepth, scales, depth, rows[s]);
  for (int64_t s = 0; s < steps; ++s, out += kRows * kStepDepth) {
    const void* words[kRows];
    for (int64_t j = 0; j < kRows; ++j) words[j] = rows[s][j];
    transpose_words(words, out, kRows);
  }
}

}  // namespace mixtral
