// One block per kTokens tokens: its threads share the hidden dimension, eight experts at a time.
//
// Bound: x is read once from HBM (T H values); the router (E H values: 128 KB in f32 at Mixtral's shape) once a block,
// from L2. Four tokens a block bring that below the traffic of x at T = 4096; a single token gets a block of its own,
// so that in decoding it is done after H / 1024 rounds. A token's bits depend on neither: its sums are split over the
// same threads and added in the same order.
#pragma once

#include "../cuda/kernel.cuh"  // Vector, warp_sum, dynamic_shared_memory
#include "../host_device.h"
#include "../topk_softmax/topk_softmax_kernels.cuh"  // warp_topk_softmax
#include "moe_route.h"

namespace mixtral::cuda {

inline constexpr int kRouteThreads = 256, kRouteWarps = kRouteThreads / 32, kRouteExperts = 8;

MIXTRAL_HOST_DEVICE constexpr int64_t route_shared_bytes(int tokens, int64_t experts) {
  return tokens * (experts + kRouteWarps * kRouteExperts) * static_cast<int64_t>(sizeof(float));
}

// sums[t][e] of this thread's part of the hidden dimension, for experts [first, first + kRouteExperts).
template <typename T, typename R, int kTokens, int kValues>
__device__ __forceinline__ void partial_logits(const T* const (&x)[kTokens], const R* router, int64_t hidden,
                                               int64_t experts, int64_t first, float (&sums)[kTokens][kRouteExperts]) {
  for (int64_t h = threadIdx.x * kValues; h < hidden; h += kRouteThreads * kValues) {
    Vector<T, kValues> values[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) values[t] = *reinterpret_cast<const Vector<T, kValues>*>(x[t] + h);
#pragma unroll
    for (int e = 0; e < kRouteExperts; ++e) {
      if (first + e >= experts) break;
      const auto weight = *reinterpret_cast<const Vector<R, kValues>*>(router + (first + e) * hidden + h);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
          // x needs no rounding to the router's dtype: R is float or T.
          sums[t][e] = fmaf(to_float(values[t].values[i]), to_float(weight.values[i]), sums[t][e]);
        }
      }
    }
  }
}

template <typename T, typename R, int kTokens, int kValues>
__global__ void __launch_bounds__(kRouteThreads)
    moe_route_kernel(const T* x, const R* router, const float* select_bias, RouteOutputs out, int64_t tokens,
                     int64_t hidden, int experts, int top_k, bool renormalize) {
  start_behind_previous_kernel();
  auto* logits = reinterpret_cast<float*>(dynamic_shared_memory());  // [kTokens, E]
  float* partial = logits + kTokens * experts;                       // [warps, kTokens, kRouteExperts]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  const T* rows[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) rows[t] = x + (first_token + t < tokens ? first_token + t : tokens - 1) * hidden;

  for (int first = 0; first < experts; first += kRouteExperts) {
    float sums[kTokens][kRouteExperts] = {};
    partial_logits<T, R, kTokens, kValues>(rows, router, hidden, experts, first, sums);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int e = 0; e < kRouteExperts; ++e) {
        const float sum = warp_sum(sums[t][e]);
        if (lane == 0) partial[(warp * kTokens + t) * kRouteExperts + e] = sum;
      }
    }
    __syncthreads();
    const int t = thread / kRouteExperts, e = thread % kRouteExperts;
    if (t < kTokens && first + e < experts) {
      float sum = 0.0f;
      for (int w = 0; w < kRouteWarps; ++w) sum += partial[(w * kTokens + t) * kRouteExperts + e];
      logits[t * experts + first + e] = to_float(from_float<R>(sum));
    }
    __syncthreads();
  }
  const int64_t token = first_token + warp;
  if (warp >= kTokens || token >= tokens) return;
  if (out.logits) {
    for (int e = lane; e < experts; e += kWarpSize) out.logits[token * experts + e] = logits[warp * experts + e];
    return;
  }
  warp_topk_softmax(logits + warp * experts, select_bias, out.weights + token * top_k, out.ids + token * top_k, experts,
                    top_k, renormalize);
}

inline constexpr int kRouterGradBytes = kRouteWarps * kRouteExperts * kWarpSize * static_cast<int>(sizeof(float));

// A block per token and kRouteThreads columns: grad_x [T, H].
template <typename T, typename R>
__global__ void __launch_bounds__(kRouteThreads)
    router_logits_backward_x_kernel(const float* __restrict__ grad, const R* __restrict__ router,
                                    T* __restrict__ grad_x, int64_t hidden, int experts) {
  const int64_t t = blockIdx.x, h = static_cast<int64_t>(blockIdx.y) * kRouteThreads + threadIdx.x;
  if (h >= hidden) return;
  float sum = 0.0f;
  for (int e = 0; e < experts; ++e) sum = fmaf(grad[t * experts + e], to_float(router[e * hidden + h]), sum);
  grad_x[t * hidden + h] = from_float<T>(sum);
}

// A block per 32 columns and eight experts. Its warps take every eighth token each, in order, and their sums are added
// in order: grad_router [E, H].
template <typename T, typename R>
__global__ void __launch_bounds__(kRouteThreads)
    router_logits_backward_router_kernel(const float* __restrict__ grad, const T* __restrict__ x,
                                         R* __restrict__ grad_router, int64_t tokens, int64_t hidden, int experts) {
  auto* partial = reinterpret_cast<float*>(dynamic_shared_memory());  // [warps, kRouteExperts, 32]
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t h = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  const int first = static_cast<int>(blockIdx.y) * kRouteExperts;
  float sums[kRouteExperts] = {};
  for (int64_t t = warp; t < tokens && h < hidden; t += kRouteWarps) {
    const float value = to_float(x[t * hidden + h]);
#pragma unroll
    for (int e = 0; e < kRouteExperts; ++e)
      if (first + e < experts) sums[e] = fmaf(grad[t * experts + first + e], value, sums[e]);
  }
#pragma unroll
  for (int e = 0; e < kRouteExperts; ++e) partial[(warp * kRouteExperts + e) * kWarpSize + lane] = sums[e];
  __syncthreads();
  if (first + warp >= experts || h >= hidden) return;  // warp e adds the sums of expert first + e
  float sum = 0.0f;
  for (int w = 0; w < kRouteWarps; ++w) sum += partial[(w * kRouteExperts + warp) * kWarpSize + lane];
  grad_router[(first + warp) * hidden + h] = from_float<R>(sum);
}

}  // namespace mixtral::cuda
