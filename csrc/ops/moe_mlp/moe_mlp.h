// moe_mlp: out[t] = sum_k topk_weights[t, k] * down_proj[e] * swiglu(gate_up_proj[e] * x[t]),  e = topk_ids[t, k]
//
// It has no kernels of its own. It chains moe_permute, grouped_gemm with swiglu, grouped_gemm and moe_unpermute, each
// of which rounds its result to the dtype of x. A choice of expert -1 is none: such a copy is dropped (moe_permute.h).
//
// On Hopper, few tokens are not permuted: both products find the rows of an expert by topk_ids and write each row to
// its own place. The bits are the same.
#pragma once

#include "../pack_weight/weight_view.h"

namespace mixtral {

// The weights of the layer: [E, 2I, H] and [E, H, I].
struct MoeWeights {
  Weight gate_up, down;
};

// Checks the arguments of moe_mlp, which are those of its gradient too.
MoeWeights check_moe_arguments(const char* op, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                               const Tensor& gate_up_proj, const Tensor& down_proj);

// The first rows of a tensor, as a view: those of copies that were not dropped.
inline Tensor first_rows(const Tensor& t, int64_t count) {
  return count == t.size(0) ? t : torch::stable::narrow(const_cast<Tensor&>(t), 0, 0, count);
}

// In builds with kernels for Hopper. Whether moe_mlp_hopper can compute the layer, by dtype, shapes, formats and
// layout: T K up to 64, and with int4 weights up to 32 rows (T for the first product, T K for the second). Arguments
// were checked.
bool takes_moe_mlp_hopper(const Tensor& x, const Tensor& topk_ids, const Weight& gate_up, const Weight& down);

Tensor moe_mlp_hopper(const char* op, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                      const Weight& gate_up, const Weight& down);

}  // namespace mixtral
