// router_losses: what the losses of a router are made of, as sums over the tokens that `mask` [T] keeps, so that they
// add over microbatches, layers and ranks. With p[t, :] = softmax(router_logits[t, :]):
//   load[e]     = tokens and choices with topk_ids[t, k] = e;
//   prob_sum[e] = sum_t p[t, e];
//   z_sum       = sum_t lse_t^2, lse_t = log sum_e exp(router_logits[t, e]);
//   count       = tokens.
// The balance loss of Fedus et al., "Switch Transformers" (2021), eq. 4 to 6, is E sum_e (load_e / n) (prob_sum_e / n),
// the z-loss of Zoph et al., "ST-MoE" (2022), eq. 5, is z_sum / n.
//
// router_losses_backward, with a [E] the gradient of prob_sum and b that of z_sum:
//   grad_logits[t, e] = p_te (a_e - sum_j a_j p_tj + 2 b lse_t), and exactly 0 for a masked token.
//
// A masked token is skipped, not multiplied by zero: NaN there changes nothing. Probabilities are f32; on the CPU sums
// are f64, token by token in order, so that their bits do not depend on masked tokens in between.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"
#include "../index_array.h"

namespace mixtral {

// Tokens [begin, end) of logits [T, E], mask [T] or null -> probabilities [T, E], lse [T]; masked rows are not written.
template <typename T>
void launch_router_probabilities_cpu(const T* logits, const bool* mask, float* probabilities, float* lse,
                                     int64_t experts, int64_t begin, int64_t end);

struct RouterSums {
  int64_t* load;    // [E]
  float* prob_sum;  // [E]
  float* z_sum;     // []
  int64_t* count;   // []
};

// probabilities [T, E], lse [T], ids [T, K] -> sums. Returns the first kept copy with a bad id, or -1.
int64_t launch_router_sums_cpu(const float* probabilities, const float* lse, IndexArray ids, const bool* mask,
                               RouterSums sums, int64_t tokens, int64_t experts, int64_t top_k);

// Tokens [begin, end) of grad_logits [T, E], from grad_prob_sum [E], grad_z_sum [] and logits [T, E].
template <typename T>
void launch_router_losses_backward_cpu(const float* grad_prob_sum, const float* grad_z_sum, const T* logits,
                                       const bool* mask, T* grad_logits, int64_t experts, int64_t begin, int64_t end);

// logits [T, E], ids [T, K] -> probabilities [T, E] and lse [T] (scratch), sums. A bad id is not counted.
template <typename T>
int launch_router_losses_cuda(const T* logits, IndexArray ids, const bool* mask, float* probabilities, float* lse,
                              RouterSums sums, int64_t tokens, int64_t experts, int64_t top_k, cudaStream_t stream);

template <typename T>
int launch_router_losses_backward_cuda(const float* grad_prob_sum, const float* grad_z_sum, const T* logits,
                                       const bool* mask, T* grad_logits, int64_t tokens, int64_t experts,
                                       cudaStream_t stream);

}  // namespace mixtral
