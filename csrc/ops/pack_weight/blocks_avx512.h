// Packed blocks (pack_weight.h) in AVX-512 registers: half a step, sixteen columns, at a time. A register holds one
// pair of depths, [16 columns][2], as in the rows of an AMX tile (cpu/amx.h): of bf16 or, for int8, of 16-bit integers.
// `even` and `odd` make f32 of them, `bf16` a pair of bf16.
#pragma once

#include "../cpu/isa.h"
#include "../cpu/prefetch.h"
#include "fp8_rows.h"
#include "half_steps.h"
#include "int4_levels.h"
#include "pack_weight.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace mixtral::avx512 {

inline constexpr int kGroupPairs = 4;  // pairs of depths that are made at a time
inline constexpr int kGroups = kStepDepth / (2 * kGroupPairs);

struct Pairs {
  __m512i pair[kGroupPairs];
};

MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE __m512i upper_halves(__m512i pair) {
  return _mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

// What bf16, fp8 and int4 share: pairs of bf16.
struct Bf16Pairs {
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE static __m512 even(__m512i pair) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
  }
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE static __m512 odd(__m512i pair) {
    return _mm512_castsi512_ps(upper_halves(pair));
  }
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE static __m512i bf16(__m512i pair) { return pair; }
};

// Each class is half `h` of the steps of a block whose rows are `depth` long, one step after the other from `step` on.

class Bf16Half : public HalfSteps<kStepElements>, public Bf16Pairs {
 public:
  using HalfSteps::HalfSteps;

  MIXTRAL_INLINE void begin_step() {
    HalfSteps::begin_step();
    cpu::prefetch_ahead<kStepElements>(at_);
  }

  // Group g of the step.
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE Pairs pairs(int g) const {
    Pairs out;
#pragma GCC unroll 4
    for (int p = 0; p < kGroupPairs; ++p) out.pair[p] = _mm512_loadu_si512(at_ + (g * kGroupPairs + p) * 64);
    return out;
  }
};

// The values are q * kInt8Unit: 32 bits with q in the upper 16 and zeros below.
class Int8Half : public HalfSteps<kStepElements / 2> {
 public:
  using HalfSteps::HalfSteps;

  MIXTRAL_INLINE void begin_step() {
    HalfSteps::begin_step();
    cpu::prefetch_ahead<kStepElements / 2>(at_);
  }

  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE Pairs pairs(int g) const {
    Pairs out;
#pragma GCC unroll 4
    for (int p = 0; p < kGroupPairs; ++p) {
      const char* at = at_ + (g * kGroupPairs + p) * 32;
      out.pair[p] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    }
    return out;
  }

  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE static __m512 even(__m512i pair) {
    return _mm512_cvtepi32_ps(_mm512_slli_epi32(pair, 16));
  }
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE static __m512 odd(__m512i pair) {
    return _mm512_cvtepi32_ps(upper_halves(pair));
  }
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE static __m512i bf16(__m512i pair) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even(pair)), 16);
    return _mm512_or_si512(low, _mm512_castps_si512(odd(pair)));
  }
};

// A look-up uses the lowest five bits of its index: the parity of the scale and a nibble.
class Int4Half : public Bf16Pairs {
 public:
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE Int4Half(const char* block, int64_t, int64_t step, int64_t h)
      : next_(block + step * kInt4StepBytes), h_(h) {}

  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE void begin_step() {
    at_ = next_ + kBlockRows + h_ * kBytes;
    cpu::prefetch_ahead<kBytes + kBlockRows>(at_);
    const __m512i four_times =
        _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a, 0x09090909, 0x08080808,
                         0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(next_) + h_);
    const __m512i scales = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), four_times);
    const __m512i powers = _mm512_sub_epi16(_mm512_srli_epi16(scales, 9), _mm512_set1_epi16(64));
    exponents_ = _mm512_slli_epi16(powers, 7);
    table_row_ = _mm512_slli_epi32(scales, 4);
    next_ += kInt4StepBytes;
  }

  // With the lowest bit of the scale in front of every second nibble, one shift brings each of the others into place.
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE Pairs pairs(int g) const {
    constexpr int kSelect = 0xca;  // a ? b : c
    const __m512i nibble = _mm512_set1_epi8(15), word = _mm512_loadu_si512(at_ + g * 64);
    const __m512i even = _mm512_ternarylogic_epi32(nibble, word, table_row_, kSelect);
    const __m512i odd = _mm512_ternarylogic_epi32(nibble, _mm512_srli_epi32(word, 4), table_row_, kSelect);
    return {{values(even), values(odd), values(_mm512_srli_epi16(even, 8)), values(_mm512_srli_epi16(odd, 8))}};
  }

 private:
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE __m512i values(__m512i index) const {
    return _mm512_add_epi16(_mm512_permutexvar_epi16(index, _mm512_loadu_si512(kInt4Levels)), exponents_);
  }

  static constexpr int64_t kBytes = (kInt4StepBytes - kBlockRows) / 2;
  const char *at_ = nullptr, *next_;
  const int64_t h_;
  __m512i exponents_, table_row_;
};

// An e4m3 number has the bits of its bf16 value, shifted and with another bias of the exponent; the scale adds to the
// exponent. Subnormals are looked up.
class Fp8Half : public Bf16Pairs {
 public:
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE Fp8Half(const char* block, int64_t depth, int64_t step, int64_t h)
      : rows_(block, depth, step, h) {
    const __m512i bits = _mm512_loadu_si512(rows_.scales());
    const __m512i twice = _mm512_or_si512(upper_halves(bits), _mm512_srli_epi32(bits, 16));
    exponents_ = _mm512_sub_epi16(twice, _mm512_set1_epi16(127 << 7));
  }

  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE void begin_step() { rows_.begin_step(); }

  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE Pairs pairs(int g) const {
    // Of a column's four bytes, the first two and the last two as the upper bytes of 16-bit words.
    const __m512i first =
        _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
    const __m512i last =
        _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
    const __m512i low = _mm512_loadu_si512(rows_.depths(2 * g)), high = _mm512_loadu_si512(rows_.depths(2 * g + 1));
    return {{bf16_values(_mm512_shuffle_epi8(low, first)), bf16_values(_mm512_shuffle_epi8(low, last)),
             bf16_values(_mm512_shuffle_epi8(high, first)), bf16_values(_mm512_shuffle_epi8(high, last))}};
  }

 private:
  // words: e4m3 in the upper bytes
  MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE __m512i bf16_values(__m512i words) const {
    const __m512i multiples = _mm512_zextsi128_si512(  // of 2^-9, from 0 to 7
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __m512i magnitude = _mm512_and_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi16(0x7f << 4));
    const __m512i normal = _mm512_add_epi16(magnitude, _mm512_set1_epi16((127 - 7) << 7));
    const __mmask32 is_subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8 << 4));
    const __m512i unscaled =
        _mm512_mask_permutexvar_epi16(normal, is_subnormal, _mm512_srli_epi16(magnitude, 4), multiples);
    const __mmask32 is_not_zero = _mm512_test_epi16_mask(magnitude, magnitude);
    const __m512i scaled = _mm512_mask_add_epi16(unscaled, is_not_zero, unscaled, exponents_);
    const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f << 4));
    const __m512i value = _mm512_mask_mov_epi16(scaled, is_nan, _mm512_set1_epi16(0x7fc0));
    constexpr int kOrSecondAndThird = 0xf8;  // a | b & c
    const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
    return _mm512_ternarylogic_epi32(value, words, sign, kOrSecondAndThird);
  }

  Fp8Rows rows_;
  __m512i exponents_;
};

// The pairs of a step of half a block as bf16, [16 pairs][16 columns][2].
template <typename Half>
MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE void store_step(Half& half, BFloat16* to) {
  half.begin_step();
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    const Pairs pairs = half.pairs(g);
#pragma GCC unroll 4
    for (int p = 0; p < kGroupPairs; ++p, to += 32) _mm512_storeu_si512(to, Half::bf16(pairs.pair[p]));
  }
}

// A panel of a half's format (weight_kernels.h).
template <typename Half>
MIXTRAL_TARGET_AVX512 void bf16_panel(const char* block, int64_t depth, int64_t step, int64_t steps, BFloat16* out);

}  // namespace mixtral::avx512

#endif
