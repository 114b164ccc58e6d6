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

constexpr int64_t kPairWords = 16, kInt4Groups = 4, kInt4HalfBytes = 256;  // words of a pair's row; of a half

// ---- plain loops

// The scale of element e (= 2 * row + depth mod 2) of each pair: out [2 halves][32].
template <typename Scale>
MIXTRAL_INLINE void spread_scales(const Scale* scales, float out[2][kStepDepth]) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t e = 0; e < kStepDepth; ++e) out[half][e] = to_float(scales[half * kPairWords + e / 2]);
}

MIXTRAL_INLINE void int8_steps(const int8_t* values, const float* row_scales, int64_t steps, BFloat16* out) {
  float scales[2][kStepDepth];
  spread_scales(row_scales, scales);
  for (int64_t p = 0; p < steps * kStepDepth; ++p)  // 16 pairs of one half, then of the other
    for (int64_t e = 0; e < kStepDepth; ++e)
      out[p * kStepDepth + e] =
          from_float<BFloat16>(static_cast<float>(values[p * kStepDepth + e]) * scales[p / kPairWords % 2][e]);
}

MIXTRAL_INLINE void int4_step(const char* step, BFloat16* out) {
  Half row_scales[kBlockRows];
  std::memcpy(row_scales, step, sizeof row_scales);
  float scales[2][kStepDepth];
  spread_scales(row_scales, scales);
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t group = 0; group < kInt4Groups; ++group) {
      uint32_t words[kPairWords];
      std::memcpy(words, step + sizeof row_scales + half * kInt4HalfBytes + group * sizeof words, sizeof words);
      for (int64_t nibble = 0; nibble < 8; ++nibble) {
        BFloat16* to = out + ((half * kPairWords + group * 4 + nibble / 2) * 2 + nibble % 2) * kPairWords;
        for (int64_t w = 0; w < kPairWords; ++w) {
          const auto q = static_cast<int32_t>(words[w] >> (4 * nibble) & 15u) - 8;
          to[w] = from_float<BFloat16>(static_cast<float>(q) * scales[half][nibble % 2 * kPairWords + w]);
        }
      }
    }
}

#if defined(__x86_64__)
// ---- the same values with the conversion instruction of AVX-512 BF16: it must keep up with memory

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
      for (int64_t pair = 0; pair < kPairWords; ++pair, values += kStepDepth, out += kStepDepth)
        store_pair(out, load_int8(values), load_int8(values + kPairWords), scales);
}

MIXTRAL_TARGET_AVX512_BF16 void int4_step_avx512(const char* step, BFloat16* out) {
  // The permutation reads the lowest four bits of an index: the nibble chooses its value.
  const __m512 table = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  for (int64_t half = 0; half < 2; ++half) {
    const auto* rows = reinterpret_cast<const __m256i*>(step) + half;
    const Scales scales = spread(_mm512_cvtph_ps(_mm256_loadu_si256(rows)));
    const char* words = step + kBlockRows * sizeof(Half) + half * kInt4HalfBytes;
    for (int64_t group = 0; group < kInt4Groups; ++group, words += sizeof(__m512i)) {
      __m512i nibbles = _mm512_loadu_si512(words);
#pragma GCC unroll 4
      for (int64_t pair = 0; pair < 4; ++pair, out += kStepDepth) {
        const __m512 low = _mm512_permutexvar_ps(nibbles, table);
        const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4), table);
        store_pair(out, low, high, scales);
        nibbles = _mm512_srli_epi32(nibbles, 8);
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
    if (cpu_isa() >= CpuIsa::kAvx512Bf16) {
      int4_step_avx512(step, out);
      continue;
    }
#endif
    for_cpu_isa([&] { int4_step(step, out); });
  }
}

}  // namespace mixtral
