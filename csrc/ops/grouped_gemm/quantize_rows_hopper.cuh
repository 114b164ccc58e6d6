// Rows of bf16 as e4m3 numbers and a scale each: scale = max |x| / 448, which is the largest e4m3 number; at least
// 1e-10 / 448, so that a row of zeros divides by none.
//
// A warp for each row, 16 bytes a lane at a time. It reads its row twice, the second time from cache: 2 + 1 bytes of
// memory for a value and next to no arithmetic.
#pragma once

#include <cstdint>

#include "../cuda/hopper_layout.h"

namespace mixtral::cuda {

inline constexpr int kQuantizeWarps = 4;
inline constexpr float kLargestE4m3 = 448.0f, kLeastLargest = 1e-10f;

struct BFloat16Piece {
  uint4 words;  // eight values
  __device__ __forceinline__ float operator[](int i) const {
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
    return to_float(BFloat16(static_cast<uint16_t>(all[i / 2] >> i % 2 * 16), BFloat16::from_bits()));
  }
};

// x [rows, depth], depth a multiple of 8 -> out [rows, depth], scales [rows]
__global__ void __launch_bounds__(kQuantizeWarps* kWarpSize)
    quantize_rows_kernel(const BFloat16* x, uint8_t* out, float* scales, int64_t rows, int64_t depth) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kQuantizeWarps + threadIdx.x / kWarpSize;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarpSize;
  const auto* pieces = reinterpret_cast<const BFloat16Piece*>(x + row * depth);
  float largest = kLeastLargest;
  for (int64_t p = lane; p < depth / 8; p += kWarpSize) {
    const BFloat16Piece piece = pieces[p];
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(piece[i]));
  }
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
  const float inverse = kLargestE4m3 / largest;
  for (int64_t p = lane; p < depth / 8; p += kWarpSize) {
    const BFloat16Piece piece = pieces[p];
    uint32_t words[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      words[w] = pack_e4m3(piece[w * 4] * inverse, piece[w * 4 + 1] * inverse) |
                 static_cast<uint32_t>(pack_e4m3(piece[w * 4 + 2] * inverse, piece[w * 4 + 3] * inverse)) << 16;
    }
    *reinterpret_cast<uint2*>(out + row * depth + p * 8) = uint2{words[0], words[1]};
  }
  if (lane == 0) scales[row] = largest / kLargestE4m3;
}

}  // namespace mixtral::cuda
