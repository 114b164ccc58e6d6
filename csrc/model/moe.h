// The feed-forward block: a sparse mixture of experts, or one dense expert as in Mistral 7B.
#pragma once

#include <torch/torch.h>

#include "config.h"
#include "packing.h"

namespace mixtral {

struct SparseMoeImpl : torch::nn::Module {
  // `options`: dtype and device of the parameters; the router is f32 unless config.router_in_f32 is false.
  SparseMoeImpl(const Config& config, const torch::TensorOptions& options, Packing packing);
  // x [T,H] -> [T,H]
  torch::Tensor forward(const torch::Tensor& x);

 private:
  int64_t top_k_;
  bool renormalize_;
  torch::Tensor router_;        // [E,H]
  torch::Tensor gate_up_proj_;  // [E,2I,H] or packed
  torch::Tensor down_proj_;     // [E,H,I] or packed
};
TORCH_MODULE(SparseMoe);

struct DenseMlpImpl : torch::nn::Module {
  DenseMlpImpl(const Config& config, const torch::TensorOptions& options, Packing packing);
  // x [T,H], offs [1] = T -> [T,H]
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& offs);

 private:
  torch::Tensor gate_up_proj_;  // [1,2I,H] or packed
  torch::Tensor down_proj_;     // [1,H,I] or packed
};
TORCH_MODULE(DenseMlp);

}  // namespace mixtral
