// Three kernels, none of them tuned: one block per row for grad_x; one thread per row block and column, which adds the
// block's rows of the weight's gradient; one thread per column, which adds the row blocks. Sums have one order.
#pragma once

#include <cstdint>

#include "../cuda/kernel.cuh"  // to_float, from_float, block_sum
#include "rms_norm_backward.h"

namespace mixtral::cuda {

inline constexpr int kNormBackwardThreads = 256;

// Block t: row t of grad_x, unless that is null, and scales[t].
template <typename T>
__global__ void __launch_bounds__(kNormBackwardThreads)
    rms_norm_backward_row_kernel(RmsNormBackward<T> norm, float* __restrict__ scales) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * norm.hidden;
  const T *grad = norm.grad + row, *x = norm.x + row;
  float squares = 0.0f, products = 0.0f;
  for (int64_t h = threadIdx.x; h < norm.hidden; h += kNormBackwardThreads) {
    const float value = to_float(x[h]);
    squares = fmaf(value, value, squares);
    products = fmaf(to_float(grad[h]) * to_float(norm.weight[h]), value, products);
  }
  const float count = static_cast<float>(norm.hidden);
  const float scale = rsqrtf(block_sum(squares) / count + norm.eps);
  const float mean = block_sum(products) * scale / count * scale;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  if (!norm.grad_x) return;
  for (int64_t h = threadIdx.x; h < norm.hidden; h += kNormBackwardThreads) {
    const float grad_x = scale * (to_float(grad[h]) * to_float(norm.weight[h]) - to_float(x[h]) * mean);
    norm.grad_x[row + h] = from_float<T>(norm.grad_sum ? grad_x + to_float(norm.grad_sum[row + h]) : grad_x);
  }
}

// Block (b, c): row block b, columns from 256 c on, of block_sums.
template <typename T>
__global__ void __launch_bounds__(kNormBackwardThreads)
    rms_norm_backward_weight_kernel(RmsNormBackward<T> norm, const float* __restrict__ scales) {
  const int64_t h = static_cast<int64_t>(blockIdx.y) * kNormBackwardThreads + threadIdx.x;
  if (h >= norm.hidden) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kNormRowBlock, end = begin + kNormRowBlock;
  float sum = 0.0f;
  for (int64_t t = begin; t < (end < norm.rows ? end : norm.rows); ++t) {
    const int64_t i = t * norm.hidden + h;
    sum += to_float(norm.grad[i]) * (to_float(norm.x[i]) * scales[t]);
  }
  norm.block_sums[blockIdx.x * norm.hidden + h] = sum;
}

// Block c: columns from 256 c on.
template <typename T>
__global__ void __launch_bounds__(kNormBackwardThreads)
    rms_norm_backward_sum_kernel(const float* __restrict__ block_sums, T* __restrict__ grad_weight, int64_t blocks,
                                 int64_t hidden) {
  const int64_t h = static_cast<int64_t>(blockIdx.x) * kNormBackwardThreads + threadIdx.x;
  if (h >= hidden) return;
  float sum = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) sum += block_sums[block * hidden + h];
  grad_weight[h] = from_float<T>(sum);
}

}  // namespace mixtral::cuda
