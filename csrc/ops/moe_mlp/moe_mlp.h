// moe_mlp: out[t] = sum_k topk_weights[t, k] * down_proj[e] * swiglu(gate_up_proj[e] * x[t]),  e = topk_ids[t, k]
//
// It has no kernels of its own: it chains the steps of the ops moe_permute, grouped_gemm with swiglu, grouped_gemm and
// moe_unpermute, each of which rounds its result to the dtype of x.
//
// Few tokens on Hopper are not permuted: the products take x and then the T K rows between them as they are, find the
// rows of an expert by topk_ids and write each to its own place. The bits are the same.
#pragma once

#include "../steps.h"

namespace mixtral {

// Whether moe_mlp_hopper takes the layer, by dtype, shapes, formats and layout: T K up to 64, and up to 32 rows (T,
// then T K) where they meet int4 weights. Arguments were checked.
bool takes_moe_mlp_hopper(const char* op, const Tensor& x, const Tensor& topk_ids, const Tensor& gate_up_proj,
                          const Tensor& down_proj);

Tensor moe_mlp_hopper(const char* op, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                      const Tensor& gate_up_proj, const Tensor& down_proj);

}  // namespace mixtral
