// The choice of one token by one warp: in each of K rounds the lanes look for the next expert in rank order, 32 logits
// at a time. The way back takes a warp per token too.
#pragma once

#include <cfloat>

#include "../cuda/division.cuh"
#include "../cuda/kernel.cuh"  // kWarpSize, to_float, warp_sum
#include "topk_softmax.h"

namespace mixtral::cuda {

inline constexpr int kTopkThreads = 128;

__device__ __forceinline__ RankedExpert warp_best(RankedExpert best) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const RankedExpert other{__shfl_xor_sync(0xffffffffu, best.score, offset),
                             __shfl_xor_sync(0xffffffffu, best.id, offset)};
    if (ranks_before(other, best)) best = other;
  }
  return best;
}

__device__ __forceinline__ float number_or_lowest(float x) { return x != x ? -INFINITY : x; }

// The largest logit of a row and the sum of exp(logit - max), which is NaN if any logit is.
struct SoftmaxTerms {
  float max, total;
};

template <typename T>
__device__ __forceinline__ SoftmaxTerms warp_softmax_terms(const T* row, int experts) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float max = -INFINITY, total = 0.0f;
  for (int e = lane; e < experts; e += kWarpSize) max = fmaxf(max, number_or_lowest(to_float(row[e])));
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, offset));
  for (int e = lane; e < experts; e += kWarpSize) total += expf(to_float(row[e]) - max);
  return {max, warp_sum(total)};
}

// row [E], select_bias [E] or null -> weights [K], ids [K]
template <typename T>
__device__ __forceinline__ void warp_topk_softmax(const T* row, const float* select_bias, float* weights, int32_t* ids,
                                                  int experts, int top_k, bool renormalize) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const SoftmaxTerms terms = warp_softmax_terms(row, experts);
  RankedExpert expert{INFINITY, -1};
  float top = -FLT_MAX, chosen = 0.0f;  // the largest chosen logit, which a bias may keep from being the row's
  for (int k = 0; k < top_k; ++k) {
    RankedExpert best{-INFINITY, INT32_MAX};
    for (int e = lane; e < experts; e += kWarpSize) {
      const float logit = to_float(row[e]);
      const float score = select_bias ? divide(expf(logit - terms.max), terms.total) + select_bias[e] : logit;
      const RankedExpert candidate{number_or_lowest(score), e};
      if (ranks_before(expert, candidate) && ranks_before(candidate, best)) best = candidate;
    }
    expert = warp_best(best);
    const float logit = number_or_lowest(to_float(row[expert.id]));
    if (logit > top) {
      chosen *= expf(top - logit);
      top = logit;
    }
    chosen += expf(logit - top);
    if (lane == 0) {
      ids[k] = expert.id;
      weights[k] = logit;
    }
  }
  // Every NaN of the row is in the total, and so in its weights.
  const bool among_chosen = renormalize && terms.total == terms.total;
  const float max = among_chosen ? top : terms.max, total = among_chosen ? chosen : terms.total;
  __syncwarp();  // lane 0 wrote the logits
  for (int k = lane; k < top_k; k += kWarpSize) weights[k] = divide(expf(weights[k] - max), total);
}

// One token's grad [K], row [E], weights [K], ids [K] from `first` on -> grad_logits [E]; one warp.
template <typename T>
__device__ __forceinline__ void warp_topk_softmax_backward(const float* grad, const T* row, const float* weights,
                                                           IndexArray ids, int64_t first, T* grad_logits, int experts,
                                                           int top_k, bool renormalize) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // Renormalised, the logits are not read: moe_route_backward has none then.
  const SoftmaxTerms terms = renormalize ? SoftmaxTerms{} : warp_softmax_terms(row, experts);
  float mean = 0.0f;
  for (int k = 0; k < top_k; ++k) mean = fmaf(grad[k], weights[k], mean);
  for (int e = lane; e < experts; e += kWarpSize) {
    float probability = renormalize ? 0.0f : divide(expf(to_float(row[e]) - terms.max), terms.total), own = 0.0f;
    bool chosen = false;
    for (int k = 0; k < top_k; ++k) {
      if (ids[first + k] != e) continue;
      chosen = true;
      own = grad[k];
      probability = weights[k];
    }
    grad_logits[e] = from_float<T>(renormalize && !chosen ? 0.0f : probability * (own - mean));
  }
}

template <typename T>
__global__ void __launch_bounds__(kTopkThreads)
    topk_softmax_backward_kernel(const float* __restrict__ grad, const T* __restrict__ logits,
                                 const float* __restrict__ weights, IndexArray ids, T* __restrict__ grad_logits,
                                 int64_t tokens, int experts, int top_k, bool renormalize) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kTopkThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (t >= tokens) return;  // whole warps
  warp_topk_softmax_backward(grad + t * top_k, logits + t * experts, weights + t * top_k, ids, t * top_k,
                             grad_logits + t * experts, experts, top_k, renormalize);
}

}  // namespace mixtral::cuda
