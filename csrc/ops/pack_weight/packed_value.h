// The place and the value of one weight in a packed block (pack_weight.h), on any device.
#pragma once

#include <cstring>
#include <type_traits>

#include "../host_device.h"
#include "e4m3.h"
#include "pack_weight.h"

namespace mixtral {

// Where row j of an int4 step has its group `group` of four pairs: a 32-bit word, in which nibble i of the lower and of
// the upper 16 bits is the even and the odd depth of pair i.
MIXTRAL_HOST_DEVICE constexpr int64_t int4_word_offset(int64_t j, int64_t group) {
  return kBlockRows + (j / 16 * 4 + group) * 64 + j % 16 * 4;
}

// The bits of an int4 scale as bf16. Rounding the square root of two before the product gives the same bf16 product for
// every q: with n = q + 8, a value is bf16((n - 7.5) * scale).
MIXTRAL_HOST_DEVICE constexpr uint32_t int4_scale_bits(uint32_t e) {
  constexpr uint32_t kSqrt2Mantissa = 0x35, kExponent = (127 - 64) << 7;
  return kExponent + (e >> 1 << 7) + (e & 1) * kSqrt2Mantissa;
}

template <typename T>
MIXTRAL_HOST_DEVICE inline T read_value(const char* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}

MIXTRAL_HOST_DEVICE inline BFloat16 int8_value(const char* block, int64_t depth, int64_t j, int64_t d) {
  const auto q = static_cast<int8_t>(block[d / kStepDepth * kStepElements + pair_index(j, d % kStepDepth)]);
  return BFloat16(static_cast<float>(q) * read_value<float>(block + kBlockRows * depth + j * 4));
}

MIXTRAL_HOST_DEVICE inline BFloat16 fp8_value(const char* block, int64_t depth, int64_t j, int64_t d) {
  const auto e4m3 = static_cast<uint8_t>(block[j * depth + d]);
  return BFloat16(from_e4m3(e4m3) * read_value<float>(block + kBlockRows * depth + j * 4));
}

MIXTRAL_HOST_DEVICE inline BFloat16 int4_value(const char* block, int64_t j, int64_t d) {
  const char* step = block + d / kStepDepth * kInt4StepBytes;
  const uint32_t word = read_value<uint32_t>(step + int4_word_offset(j, d % kStepDepth / 8));
  const uint32_t n = word >> (d % 8 / 2 * 4 + d % 2 * 16) & 15;
  const uint32_t scale = int4_scale_bits(static_cast<uint8_t>(step[j]));
  return BFloat16((static_cast<float>(n) - 7.5f) *
                  static_cast<float>(BFloat16(static_cast<uint16_t>(scale), BFloat16::from_bits())));
}

// The value of row j, depth d of a block whose rows are `depth` long. T is BFloat16 for the quantised formats.
template <typename T>
MIXTRAL_HOST_DEVICE T packed_value(const char* block, WeightFormat format, int64_t depth, int64_t j, int64_t d) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (format == WeightFormat::kInt8) return int8_value(block, depth, j, d);
    if (format == WeightFormat::kFp8) return fp8_value(block, depth, j, d);
    if (format == WeightFormat::kInt4) return int4_value(block, j, d);
  }
  const int64_t index = std::is_same_v<T, BFloat16> ? pair_index(j, d % kStepDepth) : plain_index(j, d % kStepDepth);
  return read_value<T>(block + (d / kStepDepth * kStepElements + index) * static_cast<int64_t>(sizeof(T)));
}

}  // namespace mixtral
