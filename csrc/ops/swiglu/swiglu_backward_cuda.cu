#include "../host_device.h"
#include "swiglu_backward_kernels.cuh"

namespace mixtral {

using namespace cuda;

template <typename T>
int launch_swiglu_backward_cuda(const T* grad, const T* gate_up, T* grad_gate_up, int64_t rows, int64_t intermediate,
                                cudaStream_t stream) {
  if (rows == 0 || intermediate == 0) return cudaSuccess;
  constexpr int64_t kMaxGridY = 65535;
  const int64_t blocks = ceil_div(intermediate, kSwigluBackwardThreads);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(blocks < kMaxGridY ? blocks : kMaxGridY));
  swiglu_backward_elementwise_kernel<<<grid, kSwigluBackwardThreads, 0, stream>>>(grad, gate_up, grad_gate_up,
                                                                                  intermediate);
  return cudaGetLastError();
}

template int launch_swiglu_backward_cuda(const float*, const float*, float*, int64_t, int64_t, cudaStream_t);
template int launch_swiglu_backward_cuda(const BFloat16*, const BFloat16*, BFloat16*, int64_t, int64_t, cudaStream_t);
template int launch_swiglu_backward_cuda(const Half*, const Half*, Half*, int64_t, int64_t, cudaStream_t);

}  // namespace mixtral
