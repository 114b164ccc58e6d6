// Packed blocks (pack_weight.h) in AVX2 registers: half a step, sixteen columns, at a time. A register holds pairs of
// depths of eight columns, [8 columns][2], of bf16 or, for int8, of 16-bit integers. `even` and `odd` make f32 of them.
#pragma once

#include "../cpu/isa.h"
#include "../cpu/prefetch.h"
#include "fp8_rows.h"
#include "half_steps.h"
#include "int4_levels.h"
#include "pack_weight.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace mixtral::avx2 {

inline constexpr int kVectors = 2;     // of eight columns
inline constexpr int kGroupPairs = 4;  // pairs of depths that are made at a time
inline constexpr int kGroups = kStepDepth / (2 * kGroupPairs);

// The pairs of a group, made.
struct Pairs {
  __m256i made[kGroupPairs];
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i operator[](int p) const { return made[p]; }
};

MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i load(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i upper_halves(__m256i pair) {
  return _mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
}

// What bf16, fp8 and int4 share: pairs of bf16.
struct Bf16Pairs {
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256 even(__m256i pair) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
  }
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256 odd(__m256i pair) { return _mm256_castsi256_ps(upper_halves(pair)); }
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256i bf16(__m256i pair) { return pair; }
};

// Each class is half `h` of the steps of a block whose rows are `depth` long, one step after the other from `step` on.

class Bf16Half : public HalfSteps<kStepElements>, public Bf16Pairs {
 public:
  using HalfSteps::HalfSteps;

  // Made when they are used: registers are few.
  struct Pairs {
    const char* at;
    MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i operator[](int p) const { return load(at + p * 64); }
  };

  // Vector v of group g of the step.
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Pairs pairs(int g, int v) const { return {at_ + g * kGroupPairs * 64 + v * 32}; }
};

// The values are q * kInt8Unit: 32 bits with q in the upper 16 and zeros below.
class Int8Half : public HalfSteps<kStepElements / 2> {
 public:
  using HalfSteps::HalfSteps;

  struct Pairs {
    const char* at;
    MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i operator[](int p) const {
      return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + p * 32)));
    }
  };

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Pairs pairs(int g, int v) const { return {at_ + g * kGroupPairs * 32 + v * 16}; }

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256 even(__m256i pair) {
    return _mm256_cvtepi32_ps(_mm256_slli_epi32(pair, 16));
  }
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256 odd(__m256i pair) { return _mm256_cvtepi32_ps(upper_halves(pair)); }
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256i bf16(__m256i pair) {
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(even(pair)), 16);
    return _mm256_or_si256(low, _mm256_castps_si256(odd(pair)));
  }
};

// The two bytes of each of kInt4Levels: [scale is odd][byte][n], twice, for the two halves of a register.
struct Int4LevelBytes {
  alignas(32) uint8_t at[2][2][32];
};
constexpr Int4LevelBytes int4_level_bytes() {
  Int4LevelBytes out{};
  for (int odd = 0; odd < 2; ++odd)
    for (int byte = 0; byte < 2; ++byte)
      for (int n = 0; n < 32; ++n)
        out.at[odd][byte][n] = static_cast<uint8_t>(kInt4Levels[odd * 16 + n % 16] >> (8 * byte));
  return out;
}
inline constexpr Int4LevelBytes kInt4LevelBytes = int4_level_bytes();

// A look-up of bytes has sixteen entries, so a level takes four: its two bytes, for an even and for an odd scale. The
// exponent of the scale is added to the finished pairs.
class Int4Half : public Bf16Pairs {
 public:
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Int4Half(const char* block, int64_t, int64_t step, int64_t h)
      : next_(block + step * kInt4StepBytes), h_(h) {}

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE void begin_step() {
    at_ = next_ + kBlockRows + h_ * kBytes;
    cpu::prefetch_ahead<kBytes>(at_);
    // Each scale twice, for the two depths of a pair; of four columns a half, twice again.
    const __m128i twice = _mm_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const __m128i scales = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(next_ + h_ * 16 + v * 8));
      const __m128i bytes = _mm_shuffle_epi8(scales, twice);
      const __m256i powers = _mm256_srli_epi16(_mm256_cvtepu8_epi16(bytes), 1);
      exponents_[v] = _mm256_slli_epi16(_mm256_sub_epi16(powers, _mm256_set1_epi16(64)), 7);
      is_odd_[v] = _mm256_slli_epi16(_mm256_permute4x64_epi64(_mm256_castsi128_si256(bytes), 0x50), 7);
    }
    next_ += kInt4StepBytes;
  }

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Pairs pairs(int g, int v) const {
    // The four bytes of a column have the nibbles of pairs 0 and 1, and of 2 and 3, at even depths, then at odd ones.
    // Bytes of the same pairs are brought side by side, pairs 0 and 1 of all columns first.
    const __m256i side_by_side =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i bytes = _mm256_shuffle_epi8(load(at_ + g * 64 + v * 32), side_by_side);
    const __m256i even = _mm256_and_si256(bytes, nibble);  // pairs 0 and 2
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    const __m256i even_low = level_bytes(0, even, v), even_high = level_bytes(1, even, v);
    const __m256i odd_low = level_bytes(0, odd, v), odd_high = level_bytes(1, odd, v);
    return {{_mm256_add_epi16(_mm256_unpacklo_epi8(even_low, even_high), exponents_[v]),
             _mm256_add_epi16(_mm256_unpacklo_epi8(odd_low, odd_high), exponents_[v]),
             _mm256_add_epi16(_mm256_unpackhi_epi8(even_low, even_high), exponents_[v]),
             _mm256_add_epi16(_mm256_unpackhi_epi8(odd_low, odd_high), exponents_[v])}};
  }

 private:
  // Byte `byte` of the levels of `n`.
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i level_bytes(int byte, __m256i n, int v) const {
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(load(kInt4LevelBytes.at[0][byte]), n),
                              _mm256_shuffle_epi8(load(kInt4LevelBytes.at[1][byte]), n), is_odd_[v]);
  }

  static constexpr int64_t kBytes = (kInt4StepBytes - kBlockRows) / 2;
  const char *at_ = nullptr, *next_;
  const int64_t h_;
  __m256i exponents_[kVectors], is_odd_[kVectors];
};

// An e4m3 number has the bits of its bf16 value, shifted and with another bias of the exponent; the scale adds to the
// exponent. A subnormal's two bytes are looked up by their places in the table.
class Fp8Half : public Bf16Pairs {
 public:
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Fp8Half(const char* block, int64_t depth, int64_t step, int64_t h)
      : rows_(block, depth, step, h) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const __m256i bits = load(rows_.scales() + v * 32);
      const __m256i twice = _mm256_or_si256(upper_halves(bits), _mm256_srli_epi32(bits, 16));
      exponents_[v] = _mm256_sub_epi16(twice, _mm256_set1_epi16(127 << 7));
    }
  }

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE void begin_step() { rows_.begin_step(); }

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Pairs pairs(int g, int v) const {
    // Of a column's four bytes, the first two and the last two as the upper bytes of 16-bit words.
    const __m256i first =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
    const __m256i last =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
    const __m256i low = load(rows_.depths(2 * g) + v * 32), high = load(rows_.depths(2 * g + 1) + v * 32);
    return {{bf16_values(_mm256_shuffle_epi8(low, first), v), bf16_values(_mm256_shuffle_epi8(low, last), v),
             bf16_values(_mm256_shuffle_epi8(high, first), v), bf16_values(_mm256_shuffle_epi8(high, last), v)}};
  }

 private:
  // words: e4m3 in the upper bytes
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i bf16_values(__m256i words, int v) const {
    const __m256i multiples = _mm256_broadcastsi128_si256(  // of 2^-9, from 0 to 7
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __m256i magnitude = _mm256_and_si256(_mm256_srli_epi16(words, 4), _mm256_set1_epi16(0x7f << 4));
    const __m256i place = _mm256_mullo_epi16(_mm256_srli_epi16(magnitude, 4), _mm256_set1_epi16(0x0202));
    const __m256i subnormal = _mm256_shuffle_epi8(multiples, _mm256_add_epi16(place, _mm256_set1_epi16(0x0100)));
    const __m256i normal = _mm256_add_epi16(magnitude, _mm256_set1_epi16((127 - 7) << 7));
    const __m256i is_subnormal = _mm256_cmpgt_epi16(_mm256_set1_epi16(8 << 4), magnitude);
    const __m256i unscaled = _mm256_blendv_epi8(normal, subnormal, is_subnormal);
    const __m256i is_zero = _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256());
    const __m256i scaled = _mm256_add_epi16(unscaled, _mm256_andnot_si256(is_zero, exponents_[v]));
    const __m256i is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f << 4));
    const __m256i value = _mm256_blendv_epi8(scaled, _mm256_set1_epi16(0x7fc0), is_nan);
    return _mm256_or_si256(value, _mm256_and_si256(words, _mm256_set1_epi16(static_cast<int16_t>(0x8000))));
  }

  Fp8Rows rows_;
  __m256i exponents_[kVectors];
};

}  // namespace mixtral::avx2

#endif
