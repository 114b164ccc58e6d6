// Watches a forward pass from inside: for calibration, and for whoever asks where tokens are routed.
#pragma once

#include "libtorch.h"

namespace mixtral {

// Batch::observer is told of each product just before it is computed, in the order of the layers. It may still change
// the weights. Functions that a subclass leaves out do nothing.
class ForwardObserver {
 public:
  virtual ~ForwardObserver() = default;
  // x [T,Kdim] meets weight [N,Kdim], [1,N,Kdim] or packed.
  virtual void before_linear(const torch::Tensor& /*x*/, const torch::Tensor& /*weight*/) {}
  // Arguments as of ops::moe_mlp.
  virtual void before_experts(const torch::Tensor& /*x*/, const torch::Tensor& /*topk_weights*/,
                              const torch::Tensor& /*topk_ids*/, const torch::Tensor& /*gate_up_proj*/,
                              const torch::Tensor& /*down_proj*/) {}
};

}  // namespace mixtral
