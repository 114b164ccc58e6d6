// The gradients of moe_mlp. Row r of the products belongs to a copy, token t at its choice k, with the weight
// w = topk_weights[t, k] and the expert e. With z[r] = gate_up_proj[e] x[t] and a[r] = swiglu(z[r]):
//
//   g[r]               = down_proj[e]^T grad[t]
//   grad_topk_weights  = <g[r], a[r]>                    which needs no output of an expert
//   grad_z[r]          = swiglu_backward(w g[r], z[r])
//   grad_x[t]          = sum_k gate_up_proj[e]^T grad_z[r]
//   grad_gate_up_proj  = sum_r grad_z[r] x[t]^T          over the rows of e
//   grad_down_proj     = sum_r grad[t] (w a[r])^T
//
// The products are those of grouped_gemm_backward_*; what is between them is below. The gradient of the weights without
// outputs of the experts is that of Guo et al., "SonicMoE" (2025).
#pragma once

#include <cstdint>

#include "../cuda/stream.h"

namespace mixtral {

// The step between the products, row by row; M = T K rows.
template <typename T>
struct MoeActivationGradient {
  const int32_t* row_map;  // [T, K]: the row of each copy, -1 if it was dropped (on CUDA)
  const float* weights;    // [T, K]
  const T* gate_up;        // z [M, 2I]
  const T* activated;      // a [M, I], or null: computed from z
  T* grad;                 // g [M, I]; with `weighted` replaced by w a
  T* grad_gate_up;         // grad_z [M, 2I], or null
  float* grad_weights;     // [T, K], or null
  bool weighted;
  int64_t copies, intermediate;  // T K, I
};

// Copies [begin, end). The dot product keeps sixteen lanes, as every sum along a row.
template <typename T>
void launch_moe_activation_backward_cpu(const MoeActivationGradient<T>& gradient, int64_t begin, int64_t end);

template <typename T>
int launch_moe_activation_backward_cuda(const MoeActivationGradient<T>& gradient, cudaStream_t stream);

}  // namespace mixtral
