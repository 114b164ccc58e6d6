#include "attention.h"

#include "ops.h"

namespace mixtral {

AttentionImpl::AttentionImpl(const Config& config, int64_t layer, const std::string& path,
                             const ParameterAllocator& allocator, const Placement& placement, const TensorGroup& group)
    : layer_(layer),
      num_heads_(placement.num_heads(config)),
      num_kv_heads_(placement.num_kv_heads(config)),
      head_dim_(config.head_dim),
      window_(config.window),
      rope_theta_(config.rope_theta),
      group_(group) {
  qkv_proj_ = allocator.add(*this, path + "attention.", "qkv_proj");
  o_proj_ = allocator.add(*this, path + "attention.", "o_proj");
}

torch::Tensor AttentionImpl::attend(const torch::Tensor& x, const Batch& batch, RollingKVCache* cache) {
  const auto qkv = ops::linear(x, qkv_proj_, batch).view({x.size(0), num_heads_ + 2 * num_kv_heads_, head_dim_});
  const auto q = qkv.narrow(1, 0, num_heads_);                              // [T,Nq,D]
  const auto k = qkv.narrow(1, num_heads_, num_kv_heads_);                  // [T,Nkv,D]
  const auto v = qkv.narrow(1, num_heads_ + num_kv_heads_, num_kv_heads_);  // [T,Nkv,D]
  torch::Tensor out;                                                        // [T,Nq,D]
  if (cache) {
    const auto keys = cache->keys(layer_), values = cache->values(layer_);
    // Write, then attend: one rule for prefill, chunks and decoding.
    const auto rotated =
        ops::rolling_kv_cache_rope_write(q, k, v, batch.positions, rope_theta_, keys, values, batch.slot_mapping);
    out = ops::rolling_kv_cache_attention(rotated, keys, values, batch.page_table, batch.cu_seqlens, batch.kv_lens,
                                          window_);
  } else {
    const auto [rotated_q, rotated_k] = ops::rope(q, k, batch.positions, rope_theta_);
    out = ops::sliding_window_attention(rotated_q, rotated_k, v, batch.cu_seqlens, window_);
  }
  return out.flatten(1);
}

torch::Tensor AttentionImpl::forward(const torch::Tensor& x, const Batch& batch, RollingKVCache* cache) {
  const auto heads = group_.gather_columns(attend(x, batch, cache));
  return group_.gather_columns(ops::linear(heads, o_proj_, batch));
}

}  // namespace mixtral
