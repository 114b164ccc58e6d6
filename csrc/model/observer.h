// Watches a forward pass from inside, for calibration.
#pragma once

#include "libtorch.h"

namespace mixtral {

// The model calls Batch::observer before each product, in the order of the layers. The observer may change the weights.
// A function that a subclass does not override does nothing.
class ForwardObserver {
 public:
  virtual ~ForwardObserver() = default;
  // x [T,Kdim] will be multiplied by weight [N,Kdim], [1,N,Kdim] or packed.
  virtual void before_linear(const torch::Tensor& /*x*/, const torch::Tensor& /*weight*/) {}
  // Arguments as of ops::moe_mlp.
  virtual void before_experts(const torch::Tensor& /*x*/, const torch::Tensor& /*topk_weights*/,
                              const torch::Tensor& /*topk_ids*/, const torch::Tensor& /*gate_up_proj*/,
                              const torch::Tensor& /*down_proj*/) {}
};

}  // namespace mixtral
