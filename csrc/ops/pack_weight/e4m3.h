// Rows of 8-bit floats with one scale each: fp8 weights, and the left operands of products with them.
//
// e4m3 has a sign, 4 bits of exponent and 3 of mantissa, no infinity, and 448 as its largest value (Micikevicius et
// al., "FP8 Formats for Deep Learning", 2022, section 3). The scale of a row is a power of two, as in the Microscaling
// formats (Rouhani et al., 2023): dividing by it is exact, and scale * e4m3 is a bf16 value.
#pragma once

#include <cstdint>
#include <cstring>

#include "../host_device.h"

namespace mixtral {

// The bits of a row's scale as f32: the smallest power of two with largest / scale <= 448, where that is 1.75 * 2^8,
// and at least 2^-117, below which scale * e4m3 could be subnormal. NaN where `largest_bits`, those of the largest
// magnitude of the row as f32, are of inf or NaN.
MIXTRAL_HOST_DEVICE inline uint32_t e4m3_scale_bits(uint32_t largest_bits) {
  constexpr uint32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000, kLeastExponent = 10;
  if (largest_bits >= kInfinity) return kNaN;
  const uint32_t exponent = (largest_bits + 0x1fffff) >> 23;  // one more where the mantissa is above 1.75
  return (exponent > kLeastExponent + 8 ? exponent - 8 : kLeastExponent) << 23;
}

MIXTRAL_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MIXTRAL_HOST_DEVICE inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The nearest e4m3, ties to even, of a magnitude of at most 448.
MIXTRAL_HOST_DEVICE inline uint8_t to_e4m3(float value) {
  constexpr uint32_t kLeastNormal = 121u << 23, kSpacings = 20u << 23;  // 2^-6; 2^23 spacings of 3 bits of mantissa
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffff;
  // Added to a number whose last place is worth the distance between e4m3 values, the magnitude is rounded to them.
  const uint32_t binade = magnitude & 0x7f800000;
  const uint32_t grid = (binade < kLeastNormal ? kLeastNormal : binade) + kSpacings;
  const uint32_t spacings = float_to_bits(bits_to_float(magnitude) + bits_to_float(grid)) - grid;
  return static_cast<uint8_t>((bits >> 31 << 7) | (((grid - kLeastNormal - kSpacings) >> 20) + spacings));
}

// The value of an e4m3 number.
MIXTRAL_HOST_DEVICE inline float from_e4m3(uint8_t e4m3) {
  constexpr uint32_t kRebias = (127u - 7) << 23, kNaN = 0x7fc00000;
  const uint32_t magnitude = e4m3 & 0x7f;
  const float normal = bits_to_float((magnitude << 20) + kRebias);
  const float value = magnitude < 8 ? normal + normal - 0x1p-6f : normal;  // subnormals have no leading one
  const uint32_t bits = magnitude == 0x7f ? kNaN : float_to_bits(value);
  return bits_to_float(bits | static_cast<uint32_t>(e4m3 & 0x80) << 24);
}

}  // namespace mixtral
