// One block per row: the row is read once for the sum of squares and once, from L1/L2, for the output; kValues
// neighbouring values at a time.
#pragma once

#include <cstdint>

#include "../cuda/kernel.cuh"  // Vector, to_float, from_float, block_sum

namespace mixtral::cuda {

inline constexpr int kNormThreads = 256;

template <typename T, int kValues>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_row_kernel(const T* x, const T* residual, const T* weight, T* __restrict__ out, T* sum, int64_t hidden,
                        float eps) {
  start_behind_previous_kernel();
  using Values = Vector<T, kValues>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * hidden;
  float squares = 0.0f;
  for (int64_t h = threadIdx.x * kValues; h < hidden; h += kNormThreads * kValues) {
    Values values = *reinterpret_cast<const Values*>(x + row + h);
    if (residual) {
      // The statistics are those of the rounded sum, as it enters the next layer.
      const Values other = *reinterpret_cast<const Values*>(residual + row + h);
#pragma unroll
      for (int i = 0; i < kValues; ++i)
        values.values[i] = from_float<T>(to_float(values.values[i]) + to_float(other.values[i]));
      *reinterpret_cast<Values*>(sum + row + h) = values;
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) squares = fmaf(to_float(values.values[i]), to_float(values.values[i]), squares);
  }
  const float scale = rsqrtf(block_sum(squares) / static_cast<float>(hidden) + eps);
  const T* normed = residual ? sum : x;  // each thread reads back only what it wrote
  for (int64_t h = threadIdx.x * kValues; h < hidden; h += kNormThreads * kValues) {
    const Values values = *reinterpret_cast<const Values*>(normed + row + h);
    const Values scales = *reinterpret_cast<const Values*>(weight + h);
    Values result;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const T rounded = from_float<T>(to_float(values.values[i]) * scale);
      result.values[i] = from_float<T>(to_float(rounded) * to_float(scales.values[i]));
    }
    *reinterpret_cast<Values*>(out + row + h) = result;
  }
}

}  // namespace mixtral::cuda
