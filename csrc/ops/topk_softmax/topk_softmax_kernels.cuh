// The choice of one token by one warp: in each of K rounds the lanes look for the next expert in rank order, 32 logits
// at a time.
#pragma once

#include "../cuda/kernel.cuh"  // kWarpSize, to_float, warp_sum
#include "topk_softmax.h"

namespace mixtral::cuda {

__device__ __forceinline__ RankedExpert warp_best(RankedExpert best) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const RankedExpert other{__shfl_xor_sync(0xffffffffu, best.logit, offset),
                             __shfl_xor_sync(0xffffffffu, best.id, offset)};
    if (ranks_before(other, best)) best = other;
  }
  return best;
}

// row [E] -> weights [K], ids [K]
template <typename T>
__device__ __forceinline__ void warp_topk_softmax(const T* row, float* weights, int32_t* ids, int experts, int top_k,
                                                  bool renormalize) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  RankedExpert expert{INFINITY, -1};
  float chosen = 0.0f, max = 0.0f;
  for (int k = 0; k < top_k; ++k) {
    RankedExpert best{-INFINITY, INT32_MAX};
    for (int e = lane; e < experts; e += kWarpSize) {
      const float logit = to_float(row[e]);
      const RankedExpert candidate{logit != logit ? -INFINITY : logit, e};
      if (ranks_before(expert, candidate) && ranks_before(candidate, best)) best = candidate;
    }
    expert = warp_best(best);
    if (k == 0) max = expert.logit;
    chosen += expf(expert.logit - max);
    if (lane == 0) {
      ids[k] = expert.id;
      weights[k] = expf(expert.logit - max);
    }
  }
  // The sum over all experts also carries every NaN of the row into its weights.
  float total = 0.0f;
  for (int e = lane; e < experts; e += kWarpSize) total += expf(to_float(row[e]) - max);
  total = warp_sum(total);
  const float denominator = renormalize && total == total ? chosen : total;
  __syncwarp();  // lane 0 wrote the weights
  for (int k = lane; k < top_k; k += kWarpSize) weights[k] /= denominator;
}

}  // namespace mixtral::cuda
