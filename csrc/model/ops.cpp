#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

#include "observer.h"

namespace mixtral::ops {
namespace {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, double)>("mixtral::rms_norm");
  return op.call(x, weight, eps);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double)>("mixtral::add_rms_norm");
  return op.call(x, residual, weight, eps);
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& positions, double theta) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double, bool)>("mixtral::rope");
  return op.call(q, k, positions, theta, /*interleaved=*/false);
}

std::tuple<Tensor, Tensor> moe_route(const Tensor& x, const Tensor& router, int64_t top_k, bool renormalize,
                                     const std::optional<Tensor>& select_bias) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, bool, const std::optional<Tensor>&)>(
          "mixtral::moe_route");
  return op.call(x, router, top_k, renormalize, select_bias);
}

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& offs) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&)>("mixtral::grouped_gemm");
  return op.call(a, b, offs);
}

Tensor pack_weight(const Tensor& weight, const std::optional<std::string>& quantize,
                   const std::optional<Tensor>& scales) {
  static const auto op = find<Tensor(const Tensor&, std::optional<c10::string_view>, const std::optional<Tensor>&)>(
      "mixtral::pack_weight");
  return op.call(weight, quantize ? std::optional<c10::string_view>(*quantize) : std::nullopt, scales);
}

Tensor unpack_weight(const Tensor& packed) {
  static const auto op = find<Tensor(const Tensor&)>("mixtral::unpack_weight");
  return op.call(packed);
}

Tensor swiglu(const Tensor& gate_up) {
  static const auto op = find<Tensor(const Tensor&)>("mixtral::swiglu");
  return op.call(gate_up);
}

Tensor moe_mlp(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& gate_up_proj,
               const Tensor& down_proj) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("mixtral::moe_mlp");
  return op.call(x, topk_weights, topk_ids, gate_up_proj, down_proj);
}

std::tuple<Tensor, Tensor, Tensor> moe_permute(const Tensor& x, const Tensor& topk_ids, int64_t num_experts) {
  static const auto op =
      find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, int64_t)>("mixtral::moe_permute");
  return op.call(x, topk_ids, num_experts);
}

Tensor moe_unpermute(const Tensor& y, const Tensor& topk_weights, const Tensor& row_map) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&)>("mixtral::moe_unpermute");
  return op.call(y, topk_weights, row_map);
}

Tensor sliding_window_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                int64_t window) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                                     bool, std::optional<double>)>("mixtral::sliding_window_attention");
  return op.call(q, k, v, cu_seqlens, cu_seqlens, window, /*causal=*/true, /*scale=*/std::nullopt);
}

Tensor rolling_kv_cache_rope_write(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions,
                                   double theta, const Tensor& k_cache, const Tensor& v_cache,
                                   const Tensor& slot_mapping) {
  static const auto op = find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, const Tensor&,
                                     const Tensor&, const Tensor&)>("mixtral::rolling_kv_cache_rope_write");
  return op.call(q, k, v, positions, theta, k_cache, v_cache, slot_mapping);
}

Tensor rolling_kv_cache_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const Tensor& page_table, const Tensor& cu_seqlens_q, const Tensor& kv_lens,
                                  int64_t window) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                  std::optional<double>)>("mixtral::rolling_kv_cache_attention");
  return op.call(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lens, window, /*scale=*/std::nullopt);
}

Tensor linear(const Tensor& x, const Tensor& weight, const Batch& batch) {
  if (batch.observer) batch.observer->before_linear(x, weight);
  return grouped_gemm(x, weight.dim() == 2 ? weight.unsqueeze(0) : weight, batch.offs);
}

}  // namespace mixtral::ops
