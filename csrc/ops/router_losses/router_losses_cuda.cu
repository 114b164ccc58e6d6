#include <cmath>

#include "router_losses_kernels.cuh"

namespace mixtral {
namespace {

using namespace cuda;

unsigned blocks_of_warps(int64_t tokens) { return static_cast<unsigned>(ceil_div(tokens, kLossThreads / kWarpSize)); }

}  // namespace

template <typename T>
int launch_router_losses_cuda(const T* logits, IndexArray ids, const bool* mask, float* probabilities, float* lse,
                              RouterSums sums, int64_t tokens, int64_t experts, int64_t top_k, cudaStream_t stream) {
  if (tokens > 0) {
    router_probabilities_kernel<<<blocks_of_warps(tokens), kLossThreads, 0, stream>>>(
        logits, mask, probabilities, lse, tokens, static_cast<int>(experts));
  }
  router_sums_kernel<kLossThreads><<<static_cast<unsigned>(experts + 1), kLossThreads, 0, stream>>>(
      probabilities, lse, ids, mask, sums, tokens, static_cast<int>(experts), static_cast<int>(top_k));
  return cudaGetLastError();
}

template <typename T>
int launch_router_losses_backward_cuda(const float* grad_prob_sum, const float* grad_z_sum, const T* logits,
                                       const bool* mask, T* grad_logits, int64_t tokens, int64_t experts,
                                       cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  router_losses_backward_kernel<<<blocks_of_warps(tokens), kLossThreads, 0, stream>>>(
      grad_prob_sum, grad_z_sum, logits, mask, grad_logits, tokens, static_cast<int>(experts));
  return cudaGetLastError();
}

#define MIXTRAL_INSTANTIATE(T)                                                                                    \
  template int launch_router_losses_cuda(const T*, IndexArray, const bool*, float*, float*, RouterSums, int64_t,  \
                                         int64_t, int64_t, cudaStream_t);                                         \
  template int launch_router_losses_backward_cuda(const float*, const float*, const T*, const bool*, T*, int64_t, \
                                                  int64_t, cudaStream_t);
MIXTRAL_INSTANTIATE(float)
MIXTRAL_INSTANTIATE(BFloat16)
MIXTRAL_INSTANTIATE(Half)
#undef MIXTRAL_INSTANTIATE

}  // namespace mixtral
