// Packed blocks (pack_weight.h) in AVX2 registers: half a step, sixteen columns, at a time. A register holds pairs of
// depths of eight columns, [8 columns][2], of bf16 or, for int8, of 16-bit integers. `even` and `odd` make f32 of them.
#pragma once

#include "../cpu/isa.h"
#include "fp8_rows.h"
#include "half_steps.h"
#include "int4_levels.h"
#include "pack_weight.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

namespace mixtral::avx2 {

inline constexpr int kVectors = 2;     // of eight columns
inline constexpr int kGroupPairs = 4;  // pairs of depths that are made at a time
inline constexpr int kGroups = kStepDepth / (2 * kGroupPairs);

// The pairs of a group, made.
struct Pairs {
  __m256i made[kGroupPairs];
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i operator[](int p) const { return made[p]; }
};

// Vector v of group g of a half whose pairs are made one by one.
template <typename Half>
MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Pairs group(const Half& half, int g, int v) {
  const int first = g * kGroupPairs;
  return {{half.pair(first, v), half.pair(first + 1, v), half.pair(first + 2, v), half.pair(first + 3, v)}};
}

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
  static constexpr bool kInCache = false;

  using HalfSteps::HalfSteps;

  // Vector v of a pair of depths of the step.
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i pair(int p, int v) const { return load(at_ + p * 64 + v * 32); }

  // Vector v of a group of pairs.
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Pairs pairs(int g, int v) const { return group(*this, g, v); }
};

// The values are q * kInt8Unit: 32 bits with q in the upper 16 and zeros below.
class Int8Half : public HalfSteps<kStepElements / 2> {
 public:
  static constexpr bool kInCache = false;

  using HalfSteps::HalfSteps;

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i pair(int p, int v) const {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at_ + p * 32 + v * 16)));
  }

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Pairs pairs(int g, int v) const { return group(*this, g, v); }

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256 even(__m256i pair) {
    return _mm256_cvtepi32_ps(_mm256_slli_epi32(pair, 16));
  }
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256 odd(__m256i pair) { return _mm256_cvtepi32_ps(upper_halves(pair)); }
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256i bf16(__m256i pair) {
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(even(pair)), 16);
    return _mm256_or_si256(low, _mm256_castps_si256(odd(pair)));
  }
};

// Look-ups of bytes have sixteen entries, in each half of a register.
//
// Scale byte e adds 2^7 (e div 2) to the bits of a level, which are those of its even scale or, for an odd e, of its
// odd one. Adding 2^6 e instead leaves kInt4Levels[16 + n] - kInt4Levels[n] - 2^6, which is small and the same for both
// signs. With kBias added as well it stays within the lower byte. So the upper byte of a level depends on n alone and
// the lower one on the magnitude and on whether the scale is odd: both have a table of their own.
struct Int4LevelBytes {
  alignas(32) uint8_t upper[32];      // [n]
  alignas(32) uint8_t magnitude[32];  // [n], 0 to 7
  alignas(32) uint8_t lower[32];      // [scale is odd][magnitude]
};
inline constexpr int kInt4Bias = 16;
constexpr int biased_int4_level(int n, bool odd) {
  return kInt4Levels[16 * odd + n] - (64 << 7) - (odd << 6) - kInt4Bias;
}
constexpr Int4LevelBytes int4_level_bytes() {
  Int4LevelBytes out{};
  for (int i = 0; i < 32; ++i) {
    const int n = i % 16;
    out.upper[i] = static_cast<uint8_t>(biased_int4_level(n, false) >> 8);
    out.magnitude[i] = static_cast<uint8_t>(n < 8 ? 7 - n : n - 8);
    out.lower[i] = static_cast<uint8_t>(biased_int4_level(8 + n % 8, n >= 8));
  }
  return out;
}
inline constexpr Int4LevelBytes kInt4LevelBytes = int4_level_bytes();
constexpr bool int4_levels_split() {
  for (int n = 0; n < 16; ++n)
    for (const bool odd : {false, true}) {
      const int lower = kInt4LevelBytes.lower[8 * odd + kInt4LevelBytes.magnitude[n]];
      if (kInt4LevelBytes.upper[n] << 8 != biased_int4_level(n, odd) - lower) return false;
    }
  return true;
}
static_assert(int4_levels_split());

class Int4Half : public Bf16Pairs {
 public:
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Int4Half(const char* block, int64_t, int64_t step, int64_t h)
      : next_(block + step * kInt4StepBytes), h_(h) {}

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE void begin_step() {
    at_ = next_ + kBlockRows + h_ * kBytes;
    // Each scale as the upper byte of two words, and as the four bytes of a column in the order of `pairs`.
    const __m256i upper = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,  //
                                           -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
    const __m256i all = _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2, 3, 3,  //
                                         4, 4, 5, 5, 6, 6, 7, 7, 4, 4, 5, 5, 6, 6, 7, 7);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      int64_t bytes;
      std::memcpy(&bytes, next_ + h_ * 16 + v * 8, sizeof bytes);
      const __m256i scales = _mm256_set1_epi64x(bytes);
      const __m256i times_64 = _mm256_srli_epi16(_mm256_shuffle_epi8(scales, upper), 2);
      exponents_[v] = _mm256_add_epi16(times_64, _mm256_set1_epi16(kInt4Bias));
      is_odd_[v] = _mm256_and_si256(_mm256_slli_epi16(_mm256_shuffle_epi8(scales, all), 3), _mm256_set1_epi8(8));
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
    const __m256i even_lower = lower_bytes(even, v), even_upper = upper_bytes(even);
    const __m256i odd_lower = lower_bytes(odd, v), odd_upper = upper_bytes(odd);
    return {{_mm256_add_epi16(_mm256_unpacklo_epi8(even_lower, even_upper), exponents_[v]),
             _mm256_add_epi16(_mm256_unpacklo_epi8(odd_lower, odd_upper), exponents_[v]),
             _mm256_add_epi16(_mm256_unpackhi_epi8(even_lower, even_upper), exponents_[v]),
             _mm256_add_epi16(_mm256_unpackhi_epi8(odd_lower, odd_upper), exponents_[v])}};
  }

 private:
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256i upper_bytes(__m256i n) {
    return _mm256_shuffle_epi8(load(kInt4LevelBytes.upper), n);
  }
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE __m256i lower_bytes(__m256i n, int v) const {
    const __m256i magnitude = _mm256_shuffle_epi8(load(kInt4LevelBytes.magnitude), n);
    return _mm256_shuffle_epi8(load(kInt4LevelBytes.lower), _mm256_or_si256(magnitude, is_odd_[v]));
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

// Halves of int4 or fp8, decoded into the first-level cache: registers hold either what decoding needs or sums; both at
// once do not fit.
//
// A register of pairs lies in the upper half of a line. So a load that begins two bytes earlier has the even depths
// where odd ones are, and a mask makes f32 of both. A shift would take one of the two ports that multiply-adds leave
// it.
template <typename Half>
class Decoded {
 public:
  static constexpr bool kInCache = true;

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE Decoded(const char* block, int64_t depth, int64_t step, int64_t h)
      : half_(block, depth, step, h) {}

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE void begin_step() {
    half_.begin_step();
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const auto made = half_.pairs(g, v);
#pragma GCC unroll 4
        for (int p = 0; p < kGroupPairs; ++p)
          _mm256_store_si256(reinterpret_cast<__m256i*>(lines_[g * kGroupPairs + p][v] + kLineBytes / 2), made[p]);
      }
  }

  // Of the step.
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE const char* pair(int p, int v) const { return lines_[p][v] + kLineBytes / 2; }

  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256 even(const char* pair) { return Half::odd(load(pair - 2)); }
  MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE static __m256 odd(const char* pair) { return Half::odd(load(pair)); }

 private:
  static constexpr int64_t kLineBytes = 64;
  Half half_;
  alignas(kLineBytes) char lines_[kStepDepth / 2][kVectors][kLineBytes];
};

}  // namespace mixtral::avx2

#endif
