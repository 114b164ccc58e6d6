#include "moe_mlp_backward_kernels.cuh"

namespace mixtral {

using namespace cuda;

template <typename T>
int launch_moe_activation_backward_cuda(const MoeActivationGradient<T>& gradient, cudaStream_t stream) {
  if (gradient.copies == 0) return cudaSuccess;
  moe_activation_backward_kernel<<<static_cast<unsigned>(gradient.copies), kMoeBackwardThreads, 0, stream>>>(gradient);
  return cudaGetLastError();
}

template int launch_moe_activation_backward_cuda(const MoeActivationGradient<float>&, cudaStream_t);
template int launch_moe_activation_backward_cuda(const MoeActivationGradient<BFloat16>&, cudaStream_t);
template int launch_moe_activation_backward_cuda(const MoeActivationGradient<Half>&, cudaStream_t);

}  // namespace mixtral
