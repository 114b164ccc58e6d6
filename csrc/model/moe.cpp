#include "moe.h"

#include "ops.h"

namespace mixtral {

SparseMoeImpl::SparseMoeImpl(const Config& config, const torch::TensorOptions& options, Packing packing)
    : top_k_(config.top_k), renormalize_(config.renormalize) {
  const int64_t experts = config.num_experts, hidden = config.hidden_size, intermediate = config.intermediate_size;
  const auto router_options = config.router_in_f32 ? options.dtype(torch::kFloat32) : options;
  router_ = register_parameter("router", torch::empty({experts, hidden}, router_options), false);
  gate_up_proj_ =
      register_parameter("gate_up_proj", empty_matrix({experts, 2 * intermediate, hidden}, options, packing), false);
  down_proj_ = register_parameter("down_proj", empty_matrix({experts, hidden, intermediate}, options, packing), false);
}

torch::Tensor SparseMoeImpl::forward(const torch::Tensor& x) {
  const auto [topk_weights, topk_ids] = ops::moe_route(x, router_, top_k_, renormalize_);  // [T,K]
  return ops::moe_mlp(x, topk_weights, topk_ids, gate_up_proj_, down_proj_);
}

DenseMlpImpl::DenseMlpImpl(const Config& config, const torch::TensorOptions& options, Packing packing) {
  const int64_t hidden = config.hidden_size, intermediate = config.intermediate_size;
  gate_up_proj_ =
      register_parameter("gate_up_proj", empty_matrix({1, 2 * intermediate, hidden}, options, packing), false);
  down_proj_ = register_parameter("down_proj", empty_matrix({1, hidden, intermediate}, options, packing), false);
}

torch::Tensor DenseMlpImpl::forward(const torch::Tensor& x, const torch::Tensor& offs) {
  return ops::grouped_gemm(ops::swiglu(ops::grouped_gemm(x, gate_up_proj_, offs)), down_proj_, offs);
}

}  // namespace mixtral
