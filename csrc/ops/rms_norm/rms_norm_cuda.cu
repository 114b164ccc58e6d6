#include "../cuda/launch.cuh"
#include "rms_norm.h"
#include "rms_norm_kernels.cuh"

namespace mixtral {

using namespace cuda;

template <typename T>
int launch_rms_norm_cuda(const T* x, const T* residual, const T* weight, T* out, T* sum, int64_t rows, int64_t hidden,
                         float eps, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  constexpr int kValues = 16 / sizeof(T);
  // out and sum are fresh allocations, rows as long as those of x.
  const bool wide = vectors_fit<T, kValues>(x, hidden) && vectors_fit<T, kValues>(weight, hidden) &&
                    vectors_fit<T, kValues>(residual, hidden);
  const auto kernel = wide ? rms_norm_row_kernel<T, kValues> : rms_norm_row_kernel<T, 1>;
  return launch_overlapping(kernel, dim3(static_cast<unsigned>(rows)), kNormThreads, 0, stream, x, residual, weight,
                            out, sum, hidden, eps);
}

template int launch_rms_norm_cuda(const float*, const float*, const float*, float*, float*, int64_t, int64_t, float,
                                  cudaStream_t);
template int launch_rms_norm_cuda(const BFloat16*, const BFloat16*, const BFloat16*, BFloat16*, BFloat16*, int64_t,
                                  int64_t, float, cudaStream_t);
template int launch_rms_norm_cuda(const Half*, const Half*, const Half*, Half*, Half*, int64_t, int64_t, float,
                                  cudaStream_t);

}  // namespace mixtral
