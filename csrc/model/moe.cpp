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

// weights f32 [T,K], ids int32 [T,K]. Where tokens have different numbers of experts, K is the largest, and a token
// with fewer has weight 0 and expert -1, which is none, behind its own. Its bits are those of a pass where all have as
// many.
std::tuple<torch::Tensor, torch::Tensor> SparseMoeImpl::route(const torch::Tensor& x, const Batch& batch) {
  if (batch.rows_by_experts.empty()) {
    const int64_t top_k = batch.experts_per_token > 0 ? batch.experts_per_token : top_k_;
    return ops::moe_route(x, router_, top_k, renormalize_, select_bias_);
  }
  const int64_t most = batch.rows_by_experts.rbegin()->first;
  auto topk_weights = torch::zeros({x.size(0), most}, x.options().dtype(torch::kFloat32));
  auto topk_ids = torch::full({x.size(0), most}, -1, x.options().dtype(torch::kInt32));
  for (const auto& [top_k, rows] : batch.rows_by_experts) {
    const auto [weights, ids] = ops::moe_route(x.index_select(0, rows), router_, top_k, renormalize_, select_bias_);
    topk_weights.narrow(1, 0, top_k).index_copy_(0, rows, weights);
    topk_ids.narrow(1, 0, top_k).index_copy_(0, rows, ids);
  }
  return {topk_weights, topk_ids};
}

torch::Tensor SparseMoeImpl::forward(const torch::Tensor& x, const Batch& batch) {
  auto [topk_weights, topk_ids] = route(x, batch);
  if (batch.observer) {
    batch.observer->after_route(x, router_, select_bias_, topk_weights, topk_ids);
    batch.observer->before_experts(x, topk_weights, topk_ids, gate_up_proj_, down_proj_);
  }
  if (runner_) return runner_->run(layer_, x, topk_weights, topk_ids, gate_up_proj_, down_proj_);
  return ops::moe_mlp(x, topk_weights, topk_ids, gate_up_proj_, down_proj_);
}

void SparseMoeImpl::set_runner(int64_t layer, const std::shared_ptr<ExpertRunner>& runner) {
  layer_ = layer;
  runner_ = runner;
}

DenseMlpImpl::DenseMlpImpl(const std::string& path, const ParameterAllocator& allocator) {
  gate_up_proj_ = allocator.add(*this, path + "mlp.", "gate_up_proj");
  down_proj_ = allocator.add(*this, path + "mlp.", "down_proj");
}

torch::Tensor DenseMlpImpl::forward(const torch::Tensor& x, const Batch& batch) {
  return ops::linear(ops::swiglu(ops::linear(x, gate_up_proj_, batch)), down_proj_, batch);
}

}  // namespace mixtral
