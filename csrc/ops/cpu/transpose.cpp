#include "transpose.h"

#include <cstring>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mixtral::cpu {
namespace {

constexpr int64_t kWord = sizeof(uint32_t);

#if defined(__x86_64__)
// In registers: rounds that exchange single words, pairs, and quarters of the register between rows.
MIXTRAL_TARGET_AVX512 void transpose_words_avx512(const void* const rows[16], char* out, int64_t out_stride) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i + 0] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4 i + j] holds words j, 4 + j, 8 + j, 12 + j, one in each quarter, of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low_even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);        // words j, 8 + j of rows 0-7
    const __m512i low_odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);         // words 4 + j, 12 + j
    const __m512i high_even = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);  // of rows 8-15
    const __m512i high_odd = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    const __m512i words[4] = {
        _mm512_shuffle_i32x4(low_even, high_even, 0x88), _mm512_shuffle_i32x4(low_odd, high_odd, 0x88),
        _mm512_shuffle_i32x4(low_even, high_even, 0xdd), _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(out + (4 * i + j) * out_stride * kWord, words[i]);
  }
}

// 4 x 4 words in each half of the registers, the halves belonging to rows four apart.
MIXTRAL_TARGET_AVX2 void transpose_words_avx2(const void* const rows[16], char* out, int64_t out_stride) {
  for (int64_t row = 0; row < 16; row += 8) {
    for (int64_t word = 0; word < 16; word += 4) {
      __m256i r[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const auto* upper = static_cast<const char*>(rows[row + i]) + word * kWord;
        const auto* lower = static_cast<const char*>(rows[row + i + 4]) + word * kWord;
        r[i] = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(lower), reinterpret_cast<const __m128i*>(upper));
      }
      const __m256i low01 = _mm256_unpacklo_epi32(r[0], r[1]), high01 = _mm256_unpackhi_epi32(r[0], r[1]);
      const __m256i low23 = _mm256_unpacklo_epi32(r[2], r[3]), high23 = _mm256_unpackhi_epi32(r[2], r[3]);
      const __m256i words[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                                _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + ((word + i) * out_stride + row) * kWord), words[i]);
    }
  }
}
#endif

}  // namespace

void transpose_words(const void* const rows[16], void* out, int64_t out_stride) {
  auto* to = static_cast<char*>(out);
#if defined(__x86_64__)
  if (cpu_isa() >= CpuIsa::kAvx512) return transpose_words_avx512(rows, to, out_stride);
  if (cpu_isa() == CpuIsa::kAvx2) return transpose_words_avx2(rows, to, out_stride);
#endif
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t j = 0; j < 16; ++j)
      std::memcpy(to + (i * out_stride + j) * kWord, static_cast<const char*>(rows[j]) + i * kWord, kWord);
}

}  // namespace mixtral::cpu
