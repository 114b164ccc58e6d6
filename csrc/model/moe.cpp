#include "moe.h"

#include "observer.h"
#include "ops.h"
#include "router_record.h"

namespace mixtral {

SparseMoeImpl::SparseMoeImpl(const Config& config, const std::string& path, const ParameterAllocator& allocator,
                             const Placement& placement, const TensorGroup& group)
    : top_k_(config.top_k), num_experts_(config.num_experts), renormalize_(config.renormalize), group_(group) {
  if (placement.tensor_size > 1 && placement.expert_parallel) {
    Placement of = placement;
    for (of.tensor_rank = 0; of.tensor_rank < of.tensor_size; ++of.tensor_rank)
      expert_ends_.push_back(of.first_expert(config) + of.num_experts(config));
  }
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
  if (batch.routing) batch.routing->add_layer(x, router_, select_bias_, topk_weights, topk_ids);
  if (batch.observer) batch.observer->before_experts(x, topk_weights, topk_ids, gate_up_proj_, down_proj_);
  if (!expert_ends_.empty()) return expert_parallel(x, topk_weights, topk_ids);
  if (runner_) return group_.sum(runner_->run(layer_, x, topk_weights, topk_ids, gate_up_proj_, down_proj_));
  return group_.sum(ops::moe_mlp(x, topk_weights, topk_ids, gate_up_proj_, down_proj_));
}

void SparseMoeImpl::set_runner(int64_t layer, const std::shared_ptr<ExpertRunner>& runner) {
  layer_ = layer;
  runner_ = runner;
}

// The steps of ops::moe_mlp, in which each rank computes the rows of its own experts. They lie side by side, and tokens
// combine the rows of all ranks in the same order as there: the result has the same bits.
torch::Tensor SparseMoeImpl::expert_parallel(const torch::Tensor& x, const torch::Tensor& topk_weights,
                                             const torch::Tensor& topk_ids) {
  const auto [rows, offs, row_map] = ops::moe_permute(x, topk_ids, num_experts_);
  const auto ends = offs.cpu();  // [E]: every rank must know how many rows each of them computes
  std::vector<int64_t> counts;   // rows of each rank
  int64_t all = 0, begin = 0;
  for (const int64_t end : expert_ends_) {
    const int64_t row = ends.data_ptr<int32_t>()[end - 1];
    if (static_cast<int>(counts.size()) == group_.rank()) begin = all;
    counts.push_back(row - all);
    all = row;
  }
  const auto rank = static_cast<size_t>(group_.rank());
  const int64_t experts = gate_up_proj_.size(0), first = expert_ends_[rank] - experts;
  const auto own = rows.narrow(0, begin, counts[rank]);
  if (runner_) runner_->choose(topk_ids - first, gate_up_proj_, down_proj_);
  const auto own_offs = offs.narrow(0, first, experts) - begin;
  const auto activated = ops::swiglu(ops::grouped_gemm(own, gate_up_proj_, own_offs));
  own.copy_(ops::grouped_gemm(activated, down_proj_, own_offs));
  group_.gather_rows(rows.narrow(0, 0, all), counts);
  return ops::moe_unpermute(rows, topk_weights, row_map);
}

DenseMlpImpl::DenseMlpImpl(const std::string& path, const ParameterAllocator& allocator, const Placement& placement,
                           const TensorGroup& group)
    : sums_(!placement.expert_parallel), group_(group) {
  gate_up_proj_ = allocator.add(*this, path + "mlp.", "gate_up_proj");
  down_proj_ = allocator.add(*this, path + "mlp.", "down_proj");
}

torch::Tensor DenseMlpImpl::forward(const torch::Tensor& x, const Batch& batch) {
  const auto activated = ops::swiglu(ops::linear(x, gate_up_proj_, batch));
  if (sums_) return group_.sum(ops::linear(activated, down_proj_, batch));
  return group_.gather_columns(ops::linear(group_.gather_columns(activated), down_proj_, batch));
}

}  // namespace mixtral
