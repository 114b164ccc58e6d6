// The gradients of sliding_window_attention (Dao, "FlashAttention-2", 2023, algorithm 2, whose loops over queries and
// keys are exchanged here). With dO the gradient of the output and, over the keys that a query sees, S = scale Q K^T:
//
//   P = exp(S - lse),  D_i = dO_i . out_i,  dS = P (dO V^T - D)      element by element
//   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO              dK and dV summed over the query heads of a group
//
// A key that a query does not see is left out by selection, so that NaN there reaches no gradient.
#pragma once

#include <cstdint>

#include "sliding_window_attention.h"

namespace mixtral {

template <typename T>
struct AttentionBackwardProblem {
  AttentionProblem<T> forward;  // its out and lse are not used
  const T* grad;                // [T, Nq, D]
  const T* out;                 // [T, Nq, D]
  const float* lse;             // [Nq, T], -inf for a query that sees no key
  T* grad_q;                    // [T, Nq, D]
  T *grad_k, *grad_v;           // [Tk, Nkv, D]

  float* delta = nullptr;  // CUDA: room for D, [Nq, T]

  // CPU: room for the sums of grad_k and grad_v in f32, [Nkv, Tk, D rounded up to 32] each.
  float *sum_k = nullptr, *sum_v = nullptr;

  // CPU: a work item is one key/value head of one sequence.
  constexpr int64_t num_items() const { return forward.sequences * forward.num_kv_heads; }
};

// The share of one of the threads that call this with the same `items`, SharedWork::of_items(problem.num_items()).
template <typename T>
void launch_attention_backward_cpu(const AttentionBackwardProblem<T>& problem, cpu::SharedWork& items);

// head_dim is at most kMaxHeadDimCuda.
template <typename T>
int launch_attention_backward_cuda(const AttentionBackwardProblem<T>& problem, cudaStream_t stream);

}  // namespace mixtral
