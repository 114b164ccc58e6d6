// The gradients of a grouped product, each a product in which one operand lies the other way in memory than in the
// forward pass. One kernel for both and for all dtypes: a block per tile of 64 x 64 values, 4 x 4 values a thread,
// fused multiply-adds in f32, in chains of 256 products as on the CPU. Every output adds its products in the order of
// the depth, so that bits repeat.
#pragma once

#include <cstdint>

#include "../cuda/kernel.cuh"  // to_float, from_float, dynamic_shared_memory
#include "../host_device.h"
#include "../product_order.h"
#include "grouped_gemm.h"
#include "tiles.h"

namespace mixtral::cuda {

inline constexpr int kBackwardThreads = 256, kBackwardTile = 64, kBackwardDepth = 16, kBackwardPerThread = 4;
inline constexpr int kBackwardPitch = kBackwardTile + 4;
inline constexpr int64_t kBackwardSharedBytes = 2 * kBackwardDepth * kBackwardPitch * sizeof(float);

// out [rows, columns] = left [rows, depth] * right [depth, columns]; of right and out this is a part of the columns.
template <typename T>
struct BackwardTile {
  const T* left;
  int64_t row_stride, depth_stride;  // of left
  const T* right;                    // row-major, as out is
  T* out;
  int64_t stride;  // of right and out
  int64_t rows, columns, depth;
};

MIXTRAL_HOST_DEVICE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Tile `index` of the gradient of a: rows are those of grad [M, N], the depth is N; b [E, N, Kdim]. The rows after the
// last group have no depth, so that they become zeros. rows is 0 where there is no such tile.
template <typename T>
MIXTRAL_HOST_DEVICE BackwardTile<T> input_gradient_tile(const GroupedGemm<T>& gemm, int64_t index) {
  const int64_t columns = gemm.b.columns, depth = gemm.b.depth;
  const GemmTile tile =
      find_gemm_tile(gemm.offs, gemm.b.experts, gemm.rows, kBackwardTile, ceil_div(columns, kBackwardTile), index);
  if (tile.expert < 0) return {};
  const bool covered = tile.expert < gemm.b.experts;
  const int64_t column = tile.column_block * kBackwardTile;
  const T* b = static_cast<const T*>(gemm.b.data) + (covered ? tile.expert : 0) * depth * columns + column;
  return {gemm.a + tile.row_begin * depth,
          depth,
          1,
          b,
          gemm.out + tile.row_begin * columns + column,
          columns,
          tile.row_end - tile.row_begin,
          least(kBackwardTile, columns - column),
          covered ? depth : 0};
}

// Tile `index` of the gradient of b: rows are the N of an expert, the depth is that of its group.
template <typename T>
MIXTRAL_HOST_DEVICE BackwardTile<T> weight_gradient_tile(const GroupedGemmWeightGradient<T>& g, int64_t index) {
  const int64_t row_blocks = ceil_div(g.columns, kBackwardTile), column_blocks = ceil_div(g.depth, kBackwardTile);
  const int64_t expert = index / (row_blocks * column_blocks);
  const int64_t row = index / column_blocks % row_blocks * kBackwardTile,
                column = index % column_blocks * kBackwardTile;
  int64_t begin = 0;
  for (int64_t e = 0; e < expert; ++e) begin = group_end(g.offs, e, begin, g.rows);
  const int64_t end = group_end(g.offs, expert, begin, g.rows);
  return {g.grad + begin * g.columns + row,
          1,
          g.columns,
          g.a + begin * g.depth + column,
          g.out + (expert * g.columns + row) * g.depth + column,
          g.depth,
          least(kBackwardTile, g.columns - row),
          least(kBackwardTile, g.depth - column),
          end - begin};
}

// Depths [k, k + 16) of both operands -> panels [16, kBackwardPitch], with zeros outside. Neighbouring threads read
// neighbours in memory.
template <typename T>
__device__ void load_backward_panels(const BackwardTile<T>& tile, int64_t k, float* left, float* right) {
  const bool depth_first = tile.depth_stride == 1;
  for (int i = static_cast<int>(threadIdx.x); i < kBackwardTile * kBackwardDepth; i += kBackwardThreads) {
    const int row = depth_first ? i / kBackwardDepth : i % kBackwardTile;
    const int d = depth_first ? i % kBackwardDepth : i / kBackwardTile;
    const bool valid = row < tile.rows && k + d < tile.depth;
    left[d * kBackwardPitch + row] =
        valid ? to_float(tile.left[row * tile.row_stride + (k + d) * tile.depth_stride]) : 0.0f;
    const int column = i % kBackwardTile, depth = i / kBackwardTile;
    const bool inside = column < tile.columns && k + depth < tile.depth;
    right[depth * kBackwardPitch + column] = inside ? to_float(tile.right[(k + depth) * tile.stride + column]) : 0.0f;
  }
}

template <typename T>
__device__ void multiply_backward_tile(const BackwardTile<T>& tile) {
  auto* left = reinterpret_cast<float*>(dynamic_shared_memory());
  float* right = left + kBackwardDepth * kBackwardPitch;
  const int row = static_cast<int>(threadIdx.x) / 16 * kBackwardPerThread;
  const int column = static_cast<int>(threadIdx.x) % 16 * kBackwardPerThread;
  float sums[kBackwardPerThread][kBackwardPerThread] = {};
  for (int64_t begin = 0; begin < tile.depth; begin += kChainDepth) {
    float chain[kBackwardPerThread][kBackwardPerThread] = {};
    for (int64_t k = begin; k < least(begin + kChainDepth, tile.depth); k += kBackwardDepth) {
      __syncthreads();  // the previous panels have been read
      load_backward_panels(tile, k, left, right);
      __syncthreads();
      for (int d = 0; d < kBackwardDepth; ++d)
#pragma unroll
        for (int r = 0; r < kBackwardPerThread; ++r)
#pragma unroll
          for (int c = 0; c < kBackwardPerThread; ++c)
            chain[r][c] = fmaf(left[d * kBackwardPitch + row + r], right[d * kBackwardPitch + column + c], chain[r][c]);
    }
#pragma unroll
    for (int r = 0; r < kBackwardPerThread; ++r)
#pragma unroll
      for (int c = 0; c < kBackwardPerThread; ++c) sums[r][c] += chain[r][c];
  }
#pragma unroll
  for (int r = 0; r < kBackwardPerThread; ++r)
#pragma unroll
    for (int c = 0; c < kBackwardPerThread; ++c)
      if (row + r < tile.rows && column + c < tile.columns)
        tile.out[(row + r) * tile.stride + column + c] = from_float<T>(sums[r][c]);
}

template <typename T>
__global__ void __launch_bounds__(kBackwardThreads) grouped_gemm_backward_input_kernel(GroupedGemm<T> gemm) {
  const BackwardTile<T> tile = input_gradient_tile(gemm, blockIdx.x);
  if (tile.rows > 0) multiply_backward_tile(tile);
}

template <typename T>
__global__ void __launch_bounds__(kBackwardThreads)
    grouped_gemm_backward_weight_kernel(GroupedGemmWeightGradient<T> gradient) {
  multiply_backward_tile(weight_gradient_tile(gradient, blockIdx.x));
}

}  // namespace mixtral::cuda
