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
#endif

void widen(const uint8_t* values, const float* scales, int64_t depth, BFloat16 (*out)[kStepDepth]) {
#if defined(__x86_64__)
  if (cpu_isa() >= CpuIsa::kAvx512) return widen_rows_avx512(values, scales, depth, out);
#endif
  for_cpu_isa([&] { widen_rows(values, scales, depth, out); });
}

}  // namespace

void dequantize_fp8(const char* block, int64_t depth, int64_t k, int64_t steps, BFloat16* out) {
  const auto* values = reinterpret_cast<const uint8_t*>(block) + k;
  const auto* scales = reinterpret_cast<const float*>(block + depth * kBlockRows);
  BFloat16 rows[kRows][kStepDepth];
  const void* words[kRows];
  for (int64_t j = 0; j < kRows; ++j) words[j] = rows[j];
  for (int64_t s = 0; s < steps; ++s, values += kStepDepth)
    for (int64_t first = 0; first < kBlockRows; first += kRows, out += kRows * kStepDepth) {
      widen(values + first * depth, scales + first, depth, rows);
      transpose_words(words, out, kRows);
    }
}

}  // namespace mixtral
