// One warp per token: in each of K rounds the lanes look for the next expert in rank order, 32 logits at a time.
#include <climits>
#include <cmath>

#include "../cuda/common.cuh"
#include "topk_softmax.h"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int kThreads = 128;

__device__ __forceinline__ RankedExpert warp_best(RankedExpert best) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const RankedExpert other{__shfl_xor_sync(0xffffffffu, best.logit, offset),
                             __shfl_xor_sync(0xffffffffu, best.id, offset)};
    if (ranks_before(other, best)) best = other;
  }
  return best;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    topk_softmax_warp_kernel(const T* __restrict__ logits, float* __restrict__ weights, int32_t* __restrict__ ids,
                             int64_t tokens, int experts, int top_k, bool renormalize) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (t >= tokens) return;  // whole warps
  const T* row = logits + t * experts;
  RankedExpert expert{INFINITY, -1};
  float chosen = 0.0f, max = 0.0f;
  for (int k = 0; k < top_k; ++k) {
    RankedExpert best{-INFINITY, INT_MAX};
    for (int e = lane; e < experts; e += kWarpSize) {
      const float logit = to_float(row[e]);
      const RankedExpert candidate{isnan(logit) ? -INFINITY : logit, e};
      if (ranks_before(expert, candidate) && ranks_before(candidate, best)) best = candidate;
    }
    expert = warp_best(best);
    if (k == 0) max = expert.logit;
    chosen += expf(expert.logit - max);
    if (lane == 0) {
      ids[t * top_k + k] = expert.id;
      weights[t * top_k + k] = expf(expert.logit - max);
    }
  }
  // The sum over all experts also carries every NaN of the row into its weights.
  float total = 0.0f;
  for (int e = lane; e < experts; e += kWarpSize) total += expf(to_float(row[e]) - max);
  total = warp_sum(total);
  const float denominator = renormalize && !isnan(total) ? chosen : total;
  __syncwarp();  // lane 0 wrote the weights
  for (int k = lane; k < top_k; k += kWarpSize) weights[t * top_k + k] /= denominator;
}

}  // namespace

template <typename T>
int launch_topk_softmax_cuda(const T* logits, float* weights, int32_t* ids, int64_t tokens, int64_t experts,
                             int64_t top_k, bool renormalize, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  constexpr int64_t kTokensPerBlock = kThreads / kWarpSize;
  topk_softmax_warp_kernel<<<static_cast<unsigned>((tokens + kTokensPerBlock - 1) / kTokensPerBlock), kThreads, 0,
                             stream>>>(logits, weights, ids, tokens, static_cast<int>(experts), static_cast<int>(top_k),
                                       renormalize);
  return cudaGetLastError();
}

template int launch_topk_softmax_cuda(const float*, float*, int32_t*, int64_t, int64_t, int64_t, bool, cudaStream_t);
template int launch_topk_softmax_cuda(const BFloat16*, float*, int32_t*, int64_t, int64_t, int64_t, bool, cudaStream_t);
template int launch_topk_softmax_cuda(const Half*, float*, int32_t*, int64_t, int64_t, int64_t, bool, cudaStream_t);

}  // namespace mixtral
