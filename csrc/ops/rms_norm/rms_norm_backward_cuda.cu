#include "../host_device.h"
#include "rms_norm_backward_kernels.cuh"

namespace mixtral {

using namespace cuda;

template <typename T>
int launch_rms_norm_backward_cuda(const RmsNormBackward<T>& norm, float* scales, T* grad_weight, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(norm.rows, kNormRowBlock));
  const auto columns = static_cast<unsigned>(ceil_div(norm.hidden, kNormBackwardThreads));
  if (norm.rows > 0)
    rms_norm_backward_row_kernel<<<static_cast<unsigned>(norm.rows), kNormBackwardThreads, 0, stream>>>(norm, scales);
  if (grad_weight && columns > 0) {
    if (blocks > 0)
      rms_norm_backward_weight_kernel<<<dim3(blocks, columns), kNormBackwardThreads, 0, stream>>>(norm, scales);
    rms_norm_backward_sum_kernel<<<columns, kNormBackwardThreads, 0, stream>>>(norm.block_sums, grad_weight, blocks,
                                                                               norm.hidden);
  }
  return cudaGetLastError();
}

template int launch_rms_norm_backward_cuda(const RmsNormBackward<float>&, float*, float*, cudaStream_t);
template int launch_rms_norm_backward_cuda(const RmsNormBackward<BFloat16>&, float*, BFloat16*, cudaStream_t);
template int launch_rms_norm_backward_cuda(const RmsNormBackward<Half>&, float*, Half*, cudaStream_t);

}  // namespace mixtral
