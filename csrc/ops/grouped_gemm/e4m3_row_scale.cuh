// The scale of a row of bf16 that becomes e4m3 numbers (pack_weight/e4m3.h), by a warp.
#pragma once

#include <cstdint>

#include "../cuda/kernel.cuh"  // kWarpSize
#include "../pack_weight/e4m3.h"

namespace mixtral::cuda {

inline constexpr int kE4m3Warps = 4;

__device__ __forceinline__ uint32_t larger_magnitude(uint32_t largest, uint32_t bits) {
  const uint32_t magnitude = bits & 0x7FFFFFFF;  // of f32 bits; NaN is the largest
  return magnitude > largest ? magnitude : largest;
}

struct RowScale {
  float scale, inverse;
};

// From the largest magnitude that each lane of a warp found in its part of the row.
__device__ __forceinline__ RowScale row_scale(uint32_t largest) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    largest = larger_magnitude(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, mask));
  constexpr uint32_t kTwiceBias = 254u << 23;
  const uint32_t bits = e4m3_scale_bits(largest);
  return {bits_to_float(bits), bits_to_float(kTwiceBias - bits)};  // with a NaN scale, any number: the product is NaN
}

}  // namespace mixtral::cuda
