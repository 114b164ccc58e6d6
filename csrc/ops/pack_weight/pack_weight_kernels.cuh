// unpack_weight on CUDA: the plain rows of packed weights, for kernels that read no packed ones.
//
// A thread makes eight neighbouring depths of a row and stores them at once; four threads make 32 depths of the row,
// the next four those of the next row, so that the 8 rows of a warp lie next to each other in the packed block as well.
// Bound by memory: int4 reads 0.53 and writes 2 bytes a weight.
#pragma once

#include "../cuda/kernel.cuh"  // Vector
#include "packed_value.h"

namespace mixtral::cuda {

inline constexpr int kUnpackThreads = 256, kUnpackValues = 8;

// packed: `blocks` blocks of 32 rows -> out [blocks * 32, depth]
template <typename T, WeightFormat kFormat>
__global__ void __launch_bounds__(kUnpackThreads)
    unpack_weight_kernel(const char* __restrict__ packed, T* __restrict__ out, int64_t blocks, int64_t depth) {
  const int64_t index = blockIdx.x * int64_t{kUnpackThreads} + threadIdx.x,
                block = index / (kBlockRows * depth / kUnpackValues);
  if (block >= blocks) return;
  const int64_t place = index % (kBlockRows * depth / kUnpackValues);  // step by step, row by row
  const int64_t j = place / 4 % kBlockRows, d = place / (4 * kBlockRows) * 32 + place % 4 * kUnpackValues;
  const char* from = packed + block * packed_block_bytes(kFormat, depth, sizeof(T));
  Vector<T, kUnpackValues> values;
#pragma unroll
  for (int i = 0; i < kUnpackValues; ++i) values.values[i] = packed_value<T>(from, kFormat, depth, j, d + i);
  *reinterpret_cast<Vector<T, kUnpackValues>*>(out + (block * kBlockRows + j) * depth + d) = values;
}

}  // namespace mixtral::cuda
