// One block per row: the row is read once for the sum of squares and once, from L1/L2, for the output.
#include "rms_norm.h"

#include "../cuda/common.cuh"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_row_kernel(const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ weight,
                        T* __restrict__ out, T* sum, int64_t hidden, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * hidden;
  float squares = 0.0f;
  for (int64_t h = threadIdx.x; h < hidden; h += kThreads) {
    float value = to_float(x[row + h]);
    if (residual) {
      // The statistics are those of the rounded sum, as it enters the next layer.
      const T rounded = from_float<T>(value + to_float(residual[row + h]));
      sum[row + h] = rounded;
      value = to_float(rounded);
    }
    squares += value * value;
  }
  const float scale = rsqrtf(block_sum(squares) / static_cast<float>(hidden) + eps);
  const T* normed = residual ? sum : x;  // each thread reads back only what it wrote
  for (int64_t h = threadIdx.x; h < hidden; h += kThreads)
    out[row + h] = from_float<T>(to_float(from_float<T>(to_float(normed[row + h]) * scale)) * to_float(weight[h]));
}

}  // namespace

template <typename T>
int launch_rms_norm_cuda(const T* x, const T* residual, const T* weight, T* out, T* sum, int64_t rows, int64_t hidden,
                         float eps, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  rms_norm_row_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(x, residual, weight, out, sum, hidden, eps);
  return cudaGetLastError();
}

template int launch_rms_norm_cuda(const float*, const float*, const float*, float*, float*, int64_t, int64_t, float,
                                  cudaStream_t);
template int launch_rms_norm_cuda(const BFloat16*, const BFloat16*, const BFloat16*, BFloat16*, BFloat16*, int64_t,
                                  int64_t, float, cudaStream_t);
template int launch_rms_norm_cuda(const Half*, const Half*, const Half*, Half*, Half*, int64_t, int64_t, float,
                                  cudaStream_t);

}  // namespace mixtral
