// Number conversions and exp of the CPU kernels, against torch's own conversions and the f64 library function.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "ops/cpu/simd.h"

namespace mixtral::cpu {
namespace {

float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

TEST(Simd, EveryHalfAndBFloat16WidensAsInTorch) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const BFloat16 bfloat(static_cast<uint16_t>(bits), BFloat16::from_bits());
    ASSERT_EQ(bits_of(to_float(bfloat)), bits_of(static_cast<float>(bfloat))) << std::hex << bits;
    const Half half(static_cast<uint16_t>(bits), Half::from_bits());
    const float wide = to_float(half), expected = static_cast<float>(half);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(wide)) << std::hex << bits;
    } else {
      ASSERT_EQ(bits_of(wide), bits_of(expected)) << std::hex << bits;
    }
  }
}

// All upper halves of an f32 with the lower halves around each rounding decision.
TEST(Simd, Bfloat16RoundsAsInTorch) {
  for (uint32_t upper = 0; upper <= 0xffff; ++upper) {
    for (const uint32_t lower : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const float x = float_from_bits(upper << 16 | lower);
      const BFloat16 rounded = from_float<BFloat16>(x);
      if (std::isnan(x)) {
        ASSERT_TRUE(std::isnan(static_cast<float>(rounded))) << std::hex << upper << lower;
      } else {
        ASSERT_EQ(rounded.x, BFloat16(x).x) << std::hex << upper << lower;
      }
    }
  }
}

TEST(Simd, EveryHalfSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const Half half(static_cast<uint16_t>(bits), Half::from_bits());
    const Half back = from_float<Half>(to_float(half));
    if (std::isnan(static_cast<float>(half))) {
      ASSERT_TRUE(std::isnan(static_cast<float>(back))) << std::hex << bits;
    } else {
      ASSERT_EQ(back.x, half.x) << std::hex << bits;
    }
  }
}

// In units of the last place of the f32 nearest to the exact value.
double error_in_ulp(float actual, double exact) {
  const float rounded = static_cast<float>(exact);
  const double ulp = std::nextafter(rounded, std::numeric_limits<float>::infinity()) - static_cast<double>(rounded);
  return std::abs(actual - exact) / ulp;
}

// A walk over the bit patterns of f32 with a stride prime to 2^32: every exponent, subnormals, infinities and NaN.
TEST(Simd, ExpIsWithinTwoUlpWithSubnormalResults) {
  double worst = 0;
  for (uint64_t bits = 0; bits <= 0xffffffffu; bits += 977) {
    const float x = float_from_bits(static_cast<uint32_t>(bits)), actual = exp_f32(x);
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(actual));
      continue;
    }
    const double exact = std::exp(static_cast<double>(x));
    const float rounded = static_cast<float>(exact);
    if (std::isinf(rounded)) {
      ASSERT_EQ(actual, rounded) << x;
      continue;
    }
    worst = std::max(worst, error_in_ulp(actual, exact));
  }
  EXPECT_LE(worst, 2.0);
  EXPECT_EQ(exp_f32(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(exp_f32(std::numeric_limits<float>::infinity()), std::numeric_limits<float>::infinity());
  EXPECT_EQ(exp_f32(0.0f), 1.0f);
}

TEST(Simd, ExpOfNonpositiveNumbersIsWithinTwoUlp) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  double worst = 0;
  for (uint64_t bits = 0x80000000u; bits <= 0xffffffffu; bits += 977) {
    const float x = float_from_bits(static_cast<uint32_t>(bits)), actual = exp_nonpositive(x);
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(actual));
      continue;
    }
    const double exact = std::exp(static_cast<double>(x));
    const float rounded = static_cast<float>(exact);
    if (rounded < std::numeric_limits<float>::min()) {
      ASSERT_GE(actual, 0.0f) << x;
      ASSERT_LE(actual, std::numeric_limits<float>::min()) << x;
      continue;
    }
    worst = std::max(worst, error_in_ulp(actual, exact));
  }
  EXPECT_LE(worst, 2.0);
  EXPECT_EQ(exp_nonpositive(-kInfinity), 0.0f);
  EXPECT_EQ(exp_nonpositive(0.0f), 1.0f);
}

TEST(Simd, ShortLoadsAreZeroPadded) {
  const float values[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  EXPECT_EQ(sum_lanes(load_lanes(values, 5)), 15.0f);
  EXPECT_EQ(sum_lanes(load_lanes(values)), 136.0f);
}

}  // namespace
}  // namespace mixtral::cpu
