// Every op schema of the project, one line each. Implementations register themselves in <op>/<op>.cpp.
//
// Letters: T tokens, H hidden, I intermediate, E experts, K top-k, Nq query heads, Nkv key/value heads, D head dim,
// B sequences, M = T*K permuted rows, P page size, R page-table columns. "float" is f32, bf16 or f16; index tensors
// (cu_seqlens, kv_lens, page_table, slot_mapping, positions, offs, topk_ids, row_map) may be int32 or int64.
//
// <op>_backward takes the gradients of the results of <op> and returns those of its inputs. With want_<input>=False the
// gradient of that input is not computed and has no elements.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mixtral, m) {
  // x [T,H] float, weight [H] -> [T,H]
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  // grad, x [T,H], weight [H] -> grad_x [T,H], grad_weight [H]
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool want_x=True, bool want_weight=True) -> "
      "(Tensor grad_x, Tensor grad_weight)");
  // x [T,H], residual [T,H], weight [H] -> normed [T,H], sum [T,H]
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor normed, Tensor sum)");
  // grad_normed, grad_sum (None: zero), sum [T,H], weight [H] -> grad_x [T,H], of x and of residual, grad_weight [H]
  m.def(
      "add_rms_norm_backward(Tensor grad_normed, Tensor? grad_sum, Tensor sum, Tensor weight, float eps, bool "
      "want_x=True, bool want_weight=True) -> (Tensor grad_x, Tensor grad_weight)");
  // q [T,Nq,D], k [T,Nkv,D], positions [T] -> q, k rotated
  m.def("rope(Tensor q, Tensor k, Tensor positions, float theta, bool interleaved=False) -> (Tensor, Tensor)");
  // grad_q [T,Nq,D], grad_k [T,Nkv,D], positions [T] -> the same rotated back; a gradient without heads is skipped
  m.def(
      "rope_backward(Tensor grad_q, Tensor grad_k, Tensor positions, float theta, bool interleaved=False) -> (Tensor, "
      "Tensor)");
  // router_logits [T,E], select_bias f32 [E] -> weights f32 [T,K], ids int32 [T,K]
  m.def(
      "topk_softmax(Tensor router_logits, int top_k, bool renormalize=True, Tensor? select_bias=None) -> (Tensor "
      "topk_weights, Tensor topk_ids)");
  // grad f32 [T,K], router_logits [T,E], topk_weights f32 [T,K], topk_ids [T,K] -> [T,E]
  m.def(
      "topk_softmax_backward(Tensor grad, Tensor router_logits, Tensor topk_weights, Tensor topk_ids, bool "
      "renormalize=True) -> Tensor");
  // x [T,H], router [E,H] of f32 or the dtype of x -> f32 [T,E]
  m.def("router_logits(Tensor x, Tensor router) -> Tensor");
  // grad f32 [T,E], x [T,H], router [E,H] -> [T,H], [E,H]
  m.def(
      "router_logits_backward(Tensor grad, Tensor x, Tensor router, bool want_x=True, bool want_router=True) -> "
      "(Tensor grad_x, Tensor grad_router)");
  // x [T,H], router [E,H] of f32 or the dtype of x, select_bias f32 [E] -> weights f32 [T,K], ids int32 [T,K]
  m.def(
      "moe_route(Tensor x, Tensor router, int top_k, bool renormalize=True, Tensor? select_bias=None) -> (Tensor "
      "topk_weights, Tensor topk_ids)");
  // grad f32 [T,K], x [T,H], router [E,H], topk_weights f32 [T,K], topk_ids [T,K] -> [T,H], [E,H]
  m.def(
      "moe_route_backward(Tensor grad, Tensor x, Tensor router, Tensor topk_weights, Tensor topk_ids, bool "
      "renormalize=True, bool want_x=True, bool want_router=True) -> (Tensor grad_x, Tensor grad_router)");
  // router_logits [T,E], topk_ids [T,K], mask bool [T] -> load [E] and count [] int64, prob_sum [E] and z_sum [] f32
  m.def(
      "router_losses(Tensor router_logits, Tensor topk_ids, Tensor? mask=None) -> (Tensor load, Tensor prob_sum, "
      "Tensor z_sum, Tensor count)");
  // grad_prob_sum f32 [E], grad_z_sum f32 [], router_logits [T,E], mask bool [T] -> [T,E]
  m.def(
      "router_losses_backward(Tensor grad_prob_sum, Tensor grad_z_sum, Tensor router_logits, Tensor? mask=None) -> "
      "Tensor");
  // x [T,H], topk_ids [T,K] -> permuted [M,H], end offsets int32 [E], row_map int32 [T,K]
  m.def("moe_permute(Tensor x, Tensor topk_ids, int num_experts) -> (Tensor permuted, Tensor offs, Tensor row_map)");
  // grad [M,H], row_map [T,K] -> [T,H]
  m.def("moe_permute_backward(Tensor grad, Tensor row_map) -> Tensor");
  // y [M,H], topk_weights f32 [T,K], row_map [T,K] -> [T,H]
  m.def("moe_unpermute(Tensor y, Tensor topk_weights, Tensor row_map) -> Tensor");
  // grad [T,H], y [M,H], topk_weights f32 [T,K], row_map [T,K] -> [M,H], f32 [T,K]
  m.def(
      "moe_unpermute_backward(Tensor grad, Tensor y, Tensor topk_weights, Tensor row_map, bool want_y=True, bool "
      "want_topk_weights=True) -> (Tensor grad_y, Tensor grad_topk_weights)");
  // weight [E,N,Kdim] -> the same packed for the CPU kernels (pack_weight/pack_weight.h); quantize: "int8", "fp8"
  // or "int4", whose scales uint8 [E,N,Kdim/32] may be given
  m.def("pack_weight(Tensor weight, str? quantize=None, Tensor? scales=None) -> Tensor");
  // packed -> weight [E,N,Kdim]
  m.def("unpack_weight(Tensor packed) -> Tensor");
  // a [M,Kdim], b [E,N,Kdim] or packed, end offsets [E] -> [M,N]
  m.def("grouped_gemm(Tensor a, Tensor b, Tensor offs) -> Tensor");
  // grad [M,N], b [E,N,Kdim] or packed, offs [E] -> [M,Kdim]
  m.def("grouped_gemm_backward_input(Tensor grad, Tensor b, Tensor offs) -> Tensor");
  // grad [M,N], a [M,Kdim], offs [E] -> [E,N,Kdim]
  m.def("grouped_gemm_backward_weight(Tensor grad, Tensor a, Tensor offs) -> Tensor");
  // gate_up [M,2I] -> [M,I]
  m.def("swiglu(Tensor gate_up) -> Tensor");
  // grad [M,I], gate_up [M,2I] -> [M,2I]
  m.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
  // x [T,H], topk_weights f32 [T,K], topk_ids [T,K], gate_up_proj [E,2I,H], down_proj [E,H,I] or packed -> [T,H]
  m.def("moe_mlp(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up_proj, Tensor down_proj) -> Tensor");
  // the same -> out [T,H], gate_up [M,2I], activated [M,I] if it is kept, else [0,I]
  m.def(
      "moe_mlp_for_backward(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up_proj, Tensor down_proj, "
      "bool keep_activated=False) -> (Tensor out, Tensor gate_up, Tensor activated)");
  // grad [T,H], the arguments of moe_mlp, gate_up [M,2I] and activated [M,I] or None: computed again
  m.def(
      "moe_mlp_backward(Tensor grad, Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up_proj, Tensor "
      "down_proj, Tensor? gate_up=None, Tensor? activated=None, bool want_x=True, bool want_topk_weights=True, bool "
      "want_gate_up_proj=True, bool want_down_proj=True) -> (Tensor, Tensor, Tensor, Tensor)");
  // q [Tq,Nq,D], k, v [Tk,Nkv,D], cu_seqlens_q, cu_seqlens_k [B+1] -> [Tq,Nq,D]
  m.def(
      "sliding_window_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int window=0, "
      "bool causal=True, float? scale=None) -> Tensor");
  // the same -> out [Tq,Nq,D], lse f32 [Nq,Tq]
  m.def(
      "sliding_window_attention_for_backward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int window=0, bool causal=True, float? scale=None) -> (Tensor out, Tensor lse)");
  // grad and out as q; lse -> gradients of q, k and v
  m.def(
      "sliding_window_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int window=0, bool causal=True, float? scale=None) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  // k_cache, v_cache [pages,P,Nkv,D], k, v [T,Nkv,D], slot_mapping [T]: page * P + row
  m.def(
      "rolling_kv_cache_write(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slot_mapping) -> ()");
  // q [T,Nq,D], k, v [T,Nkv,D], positions [T], caches and slot_mapping as above -> q rotated; rotated k and v are
  // written
  m.def(
      "rolling_kv_cache_rope_write(Tensor q, Tensor k, Tensor v, Tensor positions, float theta, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor slot_mapping) -> Tensor");
  // q [T,Nq,D], k_cache, v_cache [pages,P,Nkv,D], page_table [B,R], cu_seqlens_q [B+1], kv_lens [B] -> [T,Nq,D]
  m.def(
      "rolling_kv_cache_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor cu_seqlens_q, "
      "Tensor kv_lens, int window=0, float? scale=None) -> Tensor");
}
