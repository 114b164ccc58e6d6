// Rows of bf16 rounded to e4m3 with a scale each (pack_weight/e4m3.h) and written as bf16 again: the left operand of
// products with fp8 weights in kernels that multiply bf16. One warp for each row, which it reads twice.
#pragma once

#include <cstdint>

#include "../cuda/kernel.cuh"  // to_float, from_float
#include "../pack_weight/e4m3.h"
#include "e4m3_row_scale.cuh"

namespace mixtral::cuda {

// a [rows, depth] -> out [rows, depth]
__global__ void __launch_bounds__(kE4m3Warps* kWarpSize)
    round_to_e4m3_kernel(const BFloat16* __restrict__ a, BFloat16* __restrict__ out, int64_t rows, int64_t depth) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kE4m3Warps + threadIdx.x / kWarpSize;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarpSize;
  uint32_t largest = 0;
  for (int64_t k = lane; k < depth; k += kWarpSize)
    largest = larger_magnitude(largest, float_to_bits(to_float(a[row * depth + k])));
  const RowScale scale = row_scale(largest);
  for (int64_t k = lane; k < depth; k += kWarpSize) {
    const uint8_t e4m3 = to_e4m3(to_float(a[row * depth + k]) * scale.inverse);
    out[row * depth + k] = from_float<BFloat16>(from_e4m3(e4m3) * scale.scale);
  }
}

}  // namespace mixtral::cuda
