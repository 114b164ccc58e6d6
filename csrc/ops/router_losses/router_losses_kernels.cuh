// Two simple kernels forward, one back. A warp takes a token; a block then sums one expert's column. Each thread adds
// every 256th token, in order, and the block's threads are added in one tree: bits repeat at every run.
#pragma once

#include "../cuda/kernel.cuh"                        // kWarpSize, to_float, from_float, warp_sum, block_sum
#include "../topk_softmax/topk_softmax_kernels.cuh"  // warp_softmax_terms
#include "router_losses.h"

namespace mixtral::cuda {

inline constexpr int kLossThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    router_probabilities_kernel(const T* __restrict__ logits, const bool* __restrict__ mask,
                                float* __restrict__ probabilities, float* __restrict__ lse, int64_t tokens,
                                int experts) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kLossThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (t >= tokens || (mask && !mask[t])) return;  // whole warps
  const T* row = logits + t * experts;
  const SoftmaxTerms terms = warp_softmax_terms(row, experts);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int e = lane; e < experts; e += kWarpSize)
    probabilities[t * experts + e] = expf(to_float(row[e]) - terms.max) / terms.total;
  if (lane == 0) lse[t] = terms.max + logf(terms.total);
}

// Block e < E: load and prob_sum of expert e; block E: z_sum and count. Counts are exact up to 2^24.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    router_sums_kernel(const float* __restrict__ probabilities, const float* __restrict__ lse, IndexArray ids,
                       const bool* __restrict__ mask, RouterSums sums, int64_t tokens, int experts, int top_k) {
  const int e = static_cast<int>(blockIdx.x);
  float sum = 0.0f, found = 0.0f;
  for (int64_t t = threadIdx.x; t < tokens; t += kThreads) {
    if (mask && !mask[t]) continue;
    if (e == experts) {
      sum = fmaf(lse[t], lse[t], sum);
      found += 1.0f;
      continue;
    }
    sum += probabilities[t * experts + e];
    for (int k = 0; k < top_k; ++k) found += ids[t * top_k + k] == e ? 1.0f : 0.0f;
  }
  sum = block_sum(sum);
  found = block_sum(found);
  if (threadIdx.x != 0) return;
  *(e == experts ? sums.z_sum : sums.prob_sum + e) = sum;
  *(e == experts ? sums.count : sums.load + e) = static_cast<int64_t>(found);
}

template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    router_losses_backward_kernel(const float* __restrict__ grad_prob_sum, const float* __restrict__ grad_z_sum,
                                  const T* __restrict__ logits, const bool* __restrict__ mask,
                                  T* __restrict__ grad_logits, int64_t tokens, int experts) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kLossThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (t >= tokens) return;  // whole warps
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const T* row = logits + t * experts;
  T* out = grad_logits + t * experts;
  if (mask && !mask[t]) {
    for (int e = lane; e < experts; e += kWarpSize) out[e] = from_float<T>(0.0f);
    return;
  }
  const SoftmaxTerms terms = warp_softmax_terms(row, experts);
  float mean = 0.0f;
  for (int e = lane; e < experts; e += kWarpSize)
    mean = fmaf(grad_prob_sum[e], expf(to_float(row[e]) - terms.max) / terms.total, mean);
  mean = warp_sum(mean);
  const float z = 2.0f * *grad_z_sum * (terms.max + logf(terms.total));
  for (int e = lane; e < experts; e += kWarpSize) {
    const float probability = expf(to_float(row[e]) - terms.max) / terms.total;
    out[e] = from_float<T>(probability * (grad_prob_sum[e] - mean + z));
  }
}

}  // namespace mixtral::cuda
