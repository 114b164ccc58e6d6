// Typed calls of the project's ops through torch's dispatcher. The model computes with them and with torch::embedding.
//
// Letters and meanings as in csrc/ops/registration.cpp.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "batch.h"
#include "libtorch.h"

namespace mixtral::ops {

using torch::Tensor;

// x [T,H], weight [H] -> [T,H]
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
// x, residual [T,H], weight [H] -> normed [T,H], sum [T,H]
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps);
// q [T,Nq,D], k [T,Nkv,D], positions [T] -> q, k rotated (half-split)
std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& positions, double theta);
// x [T,H], router [E,H], select_bias f32 [E] -> weights f32 [T,K], ids int32 [T,K]
std::tuple<Tensor, Tensor> moe_route(const Tensor& x, const Tensor& router, int64_t top_k, bool renormalize,
                                     const std::optional<Tensor>& select_bias = std::nullopt);
// a [M,Kdim], b [E,N,Kdim] or packed, end offsets [E] -> [M,N]
Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& offs);
// weight [E,N,Kdim] -> packed for the CPU kernels; quantize: "int8", "fp8" or "int4"; scales of int4 uint8
// [E,N,Kdim/32]
Tensor pack_weight(const Tensor& weight, const std::optional<std::string>& quantize,
                   const std::optional<Tensor>& scales = std::nullopt);
// The inverse: packed -> [E,N,Kdim], bf16 when quantised
Tensor unpack_weight(const Tensor& packed);
// gate_up [M,2I] -> [M,I]
Tensor swiglu(const Tensor& gate_up);
// x [T,H], topk_weights f32 [T,K], topk_ids [T,K], gate_up_proj [E,2I,H], down_proj [E,H,I] or packed -> [T,H]
Tensor moe_mlp(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& gate_up_proj,
               const Tensor& down_proj);
// x [T,H], topk_ids [T,K] -> rows sorted by expert [T*K,H], end offsets int32 [E], where each copy went int32 [T,K]
std::tuple<Tensor, Tensor, Tensor> moe_permute(const Tensor& x, const Tensor& topk_ids, int64_t num_experts);
// y [T*K,H], topk_weights f32 [T,K], row_map [T,K] -> the weighted sums [T,H]
Tensor moe_unpermute(const Tensor& y, const Tensor& topk_weights, const Tensor& row_map);
// q [T,Nq,D], k, v [T,Nkv,D], cu_seqlens [B+1] of both -> [T,Nq,D]; causal
Tensor sliding_window_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                int64_t window);
// q [T,Nq,D], k, v [T,Nkv,D], positions [T], k_cache, v_cache [pages,P,Nkv,D] (written), slot_mapping [T] -> q rotated
Tensor rolling_kv_cache_rope_write(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions,
                                   double theta, const Tensor& k_cache, const Tensor& v_cache,
                                   const Tensor& slot_mapping);
// q [T,Nq,D], k_cache, v_cache [pages,P,Nkv,D], page_table [B,R], cu_seqlens_q [B+1], kv_lens [B] -> [T,Nq,D]
Tensor rolling_kv_cache_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const Tensor& page_table, const Tensor& cu_seqlens_q, const Tensor& kv_lens,
                                  int64_t window);

// A dense linear layer is a grouped GEMM of one group: x [T,Kdim], weight [N,Kdim], [1,N,Kdim] or packed -> [T,N].
// Tells batch.observer.
Tensor linear(const Tensor& x, const Tensor& weight, const Batch& batch);

}  // namespace mixtral::ops
