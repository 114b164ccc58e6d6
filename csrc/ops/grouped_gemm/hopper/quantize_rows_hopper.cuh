// Rows of bf16 as e4m3 numbers and a scale each (pack_weight/e4m3.h).
//
// A warp for each row, 16 bytes a lane at a time. It reads its row twice, the second time from cache: 2 + 1 bytes of
// memory for a value and next to no arithmetic.
#pragma once

#include <cstdint>

#include "../../cuda/kernel_hopper.cuh"  // pack_e4m3, dependent launch
#include "../e4m3_row_scale.cuh"
#include "grouped_gemm_stream_hopper.h"

namespace mixtral::cuda {

struct BFloat16Piece {
  uint4 words;                                             // eight values
  __device__ __forceinline__ uint32_t bits(int i) const {  // as f32
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
    return i % 2 == 0 ? all[i / 2] << 16 : all[i / 2] & 0xFFFF0000;
  }
};

// a [rows, depth], depth a multiple of 8 -> out
__global__ void __launch_bounds__(kE4m3Warps* kWarpSize)
    quantize_rows_kernel(const BFloat16* a, E4m3Rows out, int64_t rows, int64_t depth) {
  let_next_kernel_start();
  wait_for_previous_kernel();  // it writes a, and may still read the memory of out
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kE4m3Warps + threadIdx.x / kWarpSize;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarpSize;
  const auto* pieces = reinterpret_cast<const BFloat16Piece*>(a + row * depth);
  uint32_t largest = 0;
  for (int64_t p = lane; p < depth / 8; p += kWarpSize) {
    const BFloat16Piece piece = pieces[p];
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = larger_magnitude(largest, piece.bits(i));
  }
  const RowScale scale = row_scale(largest);
  for (int64_t p = lane; p < depth / 8; p += kWarpSize) {
    const BFloat16Piece piece = pieces[p];
    const auto value = [&](int i) { return bits_to_float(piece.bits(i)) * scale.inverse; };
    uint32_t words[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      words[w] = pack_e4m3(value(w * 4), value(w * 4 + 1)) |
                 static_cast<uint32_t>(pack_e4m3(value(w * 4 + 2), value(w * 4 + 3))) << 16;
    }
    *reinterpret_cast<uint2*>(out.values + row * depth + p * 8) = uint2{words[0], words[1]};
  }
  if (lane == 0) out.scales[row] = scale.scale;
}

}  // namespace mixtral::cuda
