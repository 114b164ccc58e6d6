// One warp per token.
#include <cmath>

#include "topk_softmax_kernels.cuh"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    topk_softmax_warp_kernel(const T* __restrict__ logits, float* __restrict__ weights, int32_t* __restrict__ ids,
                             int64_t tokens, int experts, int top_k, bool renormalize) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (t >= tokens) return;  // whole warps
  warp_topk_softmax(logits + t * experts, weights + t * top_k, ids + t * top_k, experts, top_k, renormalize);
}

}  // namespace

template <typename T>
int launch_topk_softmax_cuda(const T* logits, float* weights, int32_t* ids, int64_t tokens, int64_t experts,
                             int64_t top_k, bool renormalize, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  constexpr int64_t kTokensPerBlock = kThreads / kWarpSize;
  topk_softmax_warp_kernel<<<static_cast<unsigned>(ceil_div(tokens, kTokensPerBlock)), kThreads, 0, stream>>>(
      logits, weights, ids, tokens, static_cast<int>(experts), static_cast<int>(top_k), renormalize);
  return cudaGetLastError();
}

template int launch_topk_softmax_cuda(const float*, float*, int32_t*, int64_t, int64_t, int64_t, bool, cudaStream_t);
template int launch_topk_softmax_cuda(const BFloat16*, float*, int32_t*, int64_t, int64_t, int64_t, bool, cudaStream_t);
template int launch_topk_softmax_cuda(const Half*, float*, int32_t*, int64_t, int64_t, int64_t, bool, cudaStream_t);

}  // namespace mixtral
