// topk_softmax: p[t, :] = softmax(router_logits[t, :]) in f32; the K largest in falling order, with their expert ids.
//   renormalize: weights[t, k] = p[t, ids[t, k]] / sum_k p[t, ids[t, k]], otherwise p[t, ids[t, k]] itself.
//
// Experts are ranked by their logits, which is the order of p without its rounding, so that all devices choose alike;
// of equal logits the smaller id comes first. A row that holds a NaN or +inf, or nothing but -inf, gets NaN weights and
// still distinct ids in [0, E).
//   select_bias [E]: experts are ranked by p[t, e] + select_bias[e], and the weights are made of p without it (Wang et
//   al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024, eq. 3). Renormalised weights are a
//   softmax over the chosen logits, so that experts whose p is zero in f32 still have shares.
//
// topk_softmax_backward, with g the gradient of the weights:
//   renormalize: grad_logits[t, ids[t, k]] = w_k (g_k - sum_j g_j w_j), exactly 0 for the experts not chosen;
//   otherwise: grad_logits[t, e] = p_e (G_e - sum_j g_j w_j), with G_e = g_k where ids[t, k] = e, and 0 elsewhere.
// Neither has a term for select_bias: it moves the choice alone.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"
#include "../host_device.h"
#include "../index_array.h"

namespace mixtral {

struct RankedExpert {
  float score;  // the logit, or with a bias p + bias
  int32_t id;
};

// The strict order of choice. NaN ranks as -inf: callers replace it first.
MIXTRAL_HOST_DEVICE inline bool ranks_before(RankedExpert a, RankedExpert b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// Rows [begin, end) of logits [T, E] -> weights [T, K], ids [T, K]. select_bias [E] or null.
template <typename T>
void launch_topk_softmax_cpu(const T* logits, const float* select_bias, float* weights, int32_t* ids, int64_t experts,
                             int64_t top_k, bool renormalize, int64_t begin, int64_t end);

template <typename T>
int launch_topk_softmax_cuda(const T* logits, const float* select_bias, float* weights, int32_t* ids, int64_t tokens,
                             int64_t experts, int64_t top_k, bool renormalize, cudaStream_t stream);

// Rows [begin, end) of grad [T, K], logits [T, E] (not read if renormalised), weights [T, K], ids [T, K] -> grad_logits
// [T, E].
template <typename T>
void launch_topk_softmax_backward_cpu(const float* grad, const T* logits, const float* weights, IndexArray ids,
                                      T* grad_logits, int64_t experts, int64_t top_k, bool renormalize, int64_t begin,
                                      int64_t end);

template <typename T>
int launch_topk_softmax_backward_cuda(const float* grad, const T* logits, const float* weights, IndexArray ids,
                                      T* grad_logits, int64_t tokens, int64_t experts, int64_t top_k, bool renormalize,
                                      cudaStream_t stream);

}  // namespace mixtral
