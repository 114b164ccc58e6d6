// One warp per token.
#include <cmath>

#include "topk_softmax_kernels.cuh"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int64_t kTokensPerBlock = kTopkThreads / kWarpSize;

template <typename T>
__global__ void __launch_bounds__(kTopkThreads)
    topk_softmax_warp_kernel(const T* __restrict__ logits, const float* __restrict__ select_bias,
                             float* __restrict__ weights, int32_t* __restrict__ ids, int64_t tokens, int experts,
                             int top_k, bool renormalize) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kWarpSize;
  if (t >= tokens) return;  // whole warps
  warp_topk_softmax(logits + t * experts, select_bias, weights + t * top_k, ids + t * top_k, experts, top_k,
                    renormalize);
}

unsigned blocks_of(int64_t tokens) { return static_cast<unsigned>(ceil_div(tokens, kTokensPerBlock)); }

}  // namespace

template <typename T>
int launch_topk_softmax_cuda(const T* logits, const float* select_bias, float* weights, int32_t* ids, int64_t tokens,
                             int64_t experts, int64_t top_k, bool renormalize, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  topk_softmax_warp_kernel<<<blocks_of(tokens), kTopkThreads, 0, stream>>>(
      logits, select_bias, weights, ids, tokens, static_cast<int>(experts), static_cast<int>(top_k), renormalize);
  return cudaGetLastError();
}

template <typename T>
int launch_topk_softmax_backward_cuda(const float* grad, const T* logits, const float* weights, IndexArray ids,
                                      T* grad_logits, int64_t tokens, int64_t experts, int64_t top_k, bool renormalize,
                                      cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  topk_softmax_backward_kernel<<<blocks_of(tokens), kTopkThreads, 0, stream>>>(
      grad, logits, weights, ids, grad_logits, tokens, static_cast<int>(experts), static_cast<int>(top_k), renormalize);
  return cudaGetLastError();
}

#define MIXTRAL_INSTANTIATE(T)                                                                                     \
  template int launch_topk_softmax_cuda(const T*, const float*, float*, int32_t*, int64_t, int64_t, int64_t, bool, \
                                        cudaStream_t);                                                             \
  template int launch_topk_softmax_backward_cuda(const float*, const T*, const float*, IndexArray, T*, int64_t,    \
                                                 int64_t, int64_t, bool, cudaStream_t);
MIXTRAL_INSTANTIATE(float)
MIXTRAL_INSTANTIATE(BFloat16)
MIXTRAL_INSTANTIATE(Half)
#undef MIXTRAL_INSTANTIATE

}  // namespace mixtral
