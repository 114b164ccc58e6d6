// Portable SIMD in plain loops: sixteen f32 lanes, always accumulated lane by lane in the same order.
//
// A reduction over K keeps lane j for the terms k = j (mod 16) and folds the lanes in one fixed tree. Every caller uses
// the same functions for any number of rows, so the bits of a result never depend on batch size, chunking or the
// number of threads. Products are fused (std::fma) in every build, so that AVX2 and AVX-512 can give the same bits.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace mixtral::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

inline constexpr int64_t kLanes = 16;

struct Lanes {
  float v[kLanes];
};

MIXTRAL_INLINE float to_float(float x) { return x; }

MIXTRAL_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Bit arithmetic instead of the F16C instruction: it vectorises for every instruction set.
MIXTRAL_INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.x & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.x & 0x7fffu) << 13;
  // Rebias the exponent by a multiplication, which also normalises subnormals; infinity and NaN need a larger one.
  const uint32_t rebias_bits = 0x77800000u;  // 2^112
  float scaled, rebias;
  std::memcpy(&scaled, &magnitude, sizeof scaled);
  std::memcpy(&rebias, &rebias_bits, sizeof rebias);
  scaled *= rebias;
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  bits |= (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | sign;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <typename T>
MIXTRAL_INLINE T from_float(float x);

template <>
MIXTRAL_INLINE float from_float<float>(float x) {
  return x;
}

// Round to nearest even; NaN stays NaN.
template <>
MIXTRAL_INLINE BFloat16 from_float<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16(static_cast<uint16_t>(x != x ? 0x7fc0u : rounded), BFloat16::from_bits());
}

template <>
MIXTRAL_INLINE Half from_float<Half>(float x) {
  return Half(x);
}

template <typename T>
MIXTRAL_INLINE Lanes load_lanes(const T* p) {
  Lanes out;
  for (int64_t j = 0; j < kLanes; ++j) out.v[j] = to_float(p[j]);
  return out;
}

// The first n < 16 values, the rest zero.
template <typename T>
MIXTRAL_INLINE Lanes load_lanes(const T* p, int64_t n) {
  Lanes out{};
  for (int64_t j = 0; j < n; ++j) out.v[j] = to_float(p[j]);
  return out;
}

MIXTRAL_INLINE void fma_lanes(Lanes& acc, const Lanes& a, const Lanes& b) {
  for (int64_t j = 0; j < kLanes; ++j) acc.v[j] = __builtin_fmaf(a.v[j], b.v[j], acc.v[j]);
}

MIXTRAL_INLINE float sum_lanes(Lanes x) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) x.v[j] += x.v[j + half];
  return x.v[0];
}

// exp(x - n ln 2) for the integer n nearest to x / ln 2: Cody-Waite reduction and a degree-6 polynomial (Cephes expf).
MIXTRAL_INLINE float exp_reduced(float x, float n) {
  float r = __builtin_fmaf(n, -0.693359375f, x);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r, 1.0f);
  return __builtin_fmaf(p, r, 1.0f);
}

// exp(x) within 0.9 ulp of f32 for finite x, 0 at -inf, inf above 88.7, NaN at NaN. Branch-free, so that it vectorises.
MIXTRAL_INLINE float exp_f32(float x) {
  const float below = x < 89.0f ? x : 89.0f;  // NaN: 89, so that no NaN is converted to an integer
  const float clamped = below > -104.0f ? below : -104.0f;
  const float n = std::nearbyintf(clamped * 1.44269504088896341f);
  // 2^n in two halves: n reaches -150 (subnormal results) and 128 (infinity), beyond one f32 exponent.
  const int32_t n_low = static_cast<int32_t>(n) >> 1, n_high = static_cast<int32_t>(n) - n_low;
  const uint32_t low_bits = static_cast<uint32_t>(n_low + 127) << 23, high_bits = static_cast<uint32_t>(n_high + 127)
                                                                                  << 23;
  float low, high;
  std::memcpy(&low, &low_bits, sizeof low);
  std::memcpy(&high, &high_bits, sizeof high);
  return x != x ? x : exp_reduced(clamped, n) * low * high;
}

// exp(x) for x <= 0, to the same error at half the cost, but subnormal results may be 0; NaN at NaN.
MIXTRAL_INLINE float exp_nonpositive(float x) {
  // One is the unit in the last place there: adding it rounds to an integer n and leaves n + 127 in the lowest bits.
  constexpr float kRounder = 12582912.0f + 127.0f;
  const float clamped = -88.0f > x ? -88.0f : x;
  const float biased = __builtin_fmaf(clamped, 1.44269504088896341f, kRounder), n = biased - kRounder;
  uint32_t bits;
  std::memcpy(&bits, &biased, sizeof bits);
  bits <<= 23;  // as an exponent
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return exp_reduced(clamped, n) * power;
}

}  // namespace mixtral::cpu
