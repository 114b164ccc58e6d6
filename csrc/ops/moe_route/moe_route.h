// moe_route: logits[t] = router x[t] in the router's dtype, then topk_softmax of them (Jiang et al., "Mixtral of
// Experts", 2024, eq. 2). An f32 router over bf16 activations is the selective precision of Fedus et al., "Switch
// Transformers" (2021), section 2.4. Sums are f32; with a bf16 or f16 router the logits are rounded to it.
//
// router_logits: the logits alone, the same bits; moe_route is topk_softmax(router_logits(x, router)).
//
// One kernel on either device: the logits of a block of tokens go straight into topk_softmax.
//
// router_logits_backward, with G the gradient of the logits [T, E]: grad_x = G router and grad_router = G^T x, in f32,
// rounded once. A rounding of the logits to the router's dtype is passed over. On the CPU the sums over experts are
// one fused multiply-add after the other; those over tokens are chains of 256, added up in order.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"

namespace mixtral {

inline constexpr int64_t kMaxRoutedExpertsCuda = 2048;  // a block's shared memory holds the logits of four tokens

// Tokens [begin, end) of x [T, H], router [E, H] -> logits [T, E]. R, float or T, is the dtype of the router, whose
// values come in f32.
template <typename T, typename R>
void launch_router_logits_cpu(const T* x, const float* router, float* logits, int64_t hidden, int64_t experts,
                              int64_t begin, int64_t end);

// The same, then the choice: weights [T, K], ids [T, K]. select_bias [E] or null.
template <typename T, typename R>
void launch_moe_route_cpu(const T* x, const float* router, const float* select_bias, float* weights, int32_t* ids,
                          int64_t hidden, int64_t experts, int64_t top_k, bool renormalize, int64_t begin, int64_t end);

// What a kernel of moe_route leaves: logits [T, E] if not null, else weights [T, K] and ids [T, K].
struct RouteOutputs {
  float* logits;
  float* weights;
  int32_t* ids;
};

// x [T, H], router [E, H]. R is float or T.
template <typename T, typename R>
int launch_moe_route_cuda(const T* x, const R* router, const float* select_bias, RouteOutputs out, int64_t tokens,
                          int64_t hidden, int64_t experts, int64_t top_k, bool renormalize, cudaStream_t stream);

// Tokens [begin, end) of grad [T, E], router [E, H] in f32 -> grad_x [T, H].
template <typename T>
void launch_router_logits_backward_x_cpu(const float* grad, const float* router, T* grad_x, int64_t hidden,
                                         int64_t experts, int64_t begin, int64_t end);

inline constexpr int64_t kGradColumns = 64;  // the columns of grad_router that are computed together

// Column blocks [begin, end) of kGradColumns: grad [T, E], x [T, H] -> grad_router [E, H].
template <typename T, typename R>
void launch_router_logits_backward_router_cpu(const float* grad, const T* x, R* grad_router, int64_t tokens,
                                              int64_t hidden, int64_t experts, int64_t begin, int64_t end);

// grad [T, E], x [T, H], router [E, H] -> grad_x [T, H], grad_router [E, H], each unless null.
template <typename T, typename R>
int launch_router_logits_backward_cuda(const float* grad, const T* x, const R* router, T* grad_x, R* grad_router,
                                       int64_t tokens, int64_t hidden, int64_t experts, cudaStream_t stream);

}  // namespace mixtral
