// Watches a forward pass from inside, for calibration and for traces of the routing.
#pragma once

#include <optional>

#include "libtorch.h"

namespace mixtral {

// The model calls Batch::observer before each product, in the order of the layers. The observer may change the weights,
// and which experts a token goes to. A function that a subclass does not override does nothing.
class ForwardObserver {
 public:
  virtual ~ForwardObserver() = default;
  // Whether after_route() changes anything, in a pass that begins now. A model that is split over ranks must know.
  virtual bool changes_routing() const { return false; }
  // x [T,Kdim] will be multiplied by weight [N,Kdim], [1,N,Kdim] or packed.
  virtual void before_linear(const torch::Tensor& /*x*/, const torch::Tensor& /*weight*/) {}
  // x [T,H] was routed by router [E,H] and select_bias f32 [E], which most models do not have: topk_weights f32 [T,K],
  // topk_ids int32 [T,K], which the experts get. An id of -1 is none: the token has fewer experts than others
  // (Batch::rows_by_experts).
  virtual void after_route(const torch::Tensor& /*x*/, const torch::Tensor& /*router*/,
                           const std::optional<torch::Tensor>& /*select_bias*/, torch::Tensor& /*topk_weights*/,
                           torch::Tensor& /*topk_ids*/) {}
  // Arguments as of ops::moe_mlp.
  virtual void before_experts(const torch::Tensor& /*x*/, const torch::Tensor& /*topk_weights*/,
                              const torch::Tensor& /*topk_ids*/, const torch::Tensor& /*gate_up_proj*/,
                              const torch::Tensor& /*down_proj*/) {}
};

}  // namespace mixtral
