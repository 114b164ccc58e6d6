#include "moe.h"

#include "observer.h"
#include "ops.h"

namespace mixtral {

SparseMoeImpl::SparseMoeImpl(const Config& config, const std::string& path, const ParameterAllocator& allocator)
    : top_k_(config.top_k), renormalize_(config.renormalize) {
  router_ = allocator.add(*this, path + "moe.", "router");
  if (config.select_bias) select_bias_ = allocator.add(*this, path + "moe.", "select_bias");
  gate_up_proj_ = allocator.add(*this, path + "moe.", "gate_up_proj");
  down_proj_ = allocator.add(*this, path + "moe.", "down_proj");
}

torch::Tensor SparseMoeImpl::forward(const torch::Tensor& x, const Batch& batch) {
  const int64_t top_k = batch.experts_per_token > 0 ? batch.experts_per_token : top_k_;
  auto [topk_weights, topk_ids] = ops::moe_route(x, router_, top_k, renormalize_, select_bias_);  // [T,K]
  if (batch.observer) {
    batch.observer->after_route(x, router_, select_bias_, topk_weights, topk_ids);
    batch.observer->before_experts(x, topk_weights, topk_ids, gate_up_proj_, down_proj_);
  }
  return ops::moe_mlp(x, topk_weights, topk_ids, gate_up_proj_, down_proj_);
}

DenseMlpImpl::DenseMlpImpl(const std::string& path, const ParameterAllocator& allocator) {
  gate_up_proj_ = allocator.add(*this, path + "mlp.", "gate_up_proj");
  down_proj_ = allocator.add(*this, path + "mlp.", "down_proj");
}

torch::Tensor DenseMlpImpl::forward(const torch::Tensor& x, const Batch& batch) {
  return ops::linear(ops::swiglu(ops::linear(x, gate_up_proj_, batch)), down_proj_, batch);
}

}  // namespace mixtral
