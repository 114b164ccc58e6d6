// moe_mlp: out[t] = sum_k topk_weights[t, k] * down_proj[e] * swiglu(gate_up_proj[e] * x[t]),  e = topk_ids[t, k]
//
// It has no kernels of its own: it chains the steps of the ops moe_permute, grouped_gemm with swiglu, grouped_gemm and
// moe_unpermute, each of which rounds its result to the dtype of x.
#pragma once

#include "../steps.h"
