// The feed-forward block: a sparse mixture of experts, or one dense expert as in Mistral 7B.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "batch.h"
#include "config.h"
#include "expert_runner.h"
#include "libtorch.h"
#include "packing.h"

namespace mixtral {

struct SparseMoeImpl : torch::nn::Module {
  // path: "layers.N.", before the parameters' names.
  SparseMoeImpl(const Config& config, const std::string& path, const ParameterAllocator& allocator);
  // x [T,H] -> [T,H]
  torch::Tensor forward(const torch::Tensor& x, const Batch& batch);
  // From now on `runner` computes the experts, which it knows as those of `layer`; null: ops::moe_mlp does.
  void set_runner(int64_t layer, const std::shared_ptr<ExpertRunner>& runner);

 private:
  std::tuple<torch::Tensor, torch::Tensor> route(const torch::Tensor& x, const Batch& batch);

  int64_t top_k_;
  bool renormalize_;
  torch::Tensor router_;                      // [E,H], f32 unless config.router_in_f32 is false
  std::optional<torch::Tensor> select_bias_;  // f32 [E]
  torch::Tensor gate_up_proj_;                // [E,2I,H] or packed
  torch::Tensor down_proj_;                   // [E,H,I] or packed
  int64_t layer_ = 0;                         // for the runner
  std::shared_ptr<ExpertRunner> runner_;      // or null
};
TORCH_MODULE(SparseMoe);

struct DenseMlpImpl : torch::nn::Module {
  DenseMlpImpl(const std::string& path, const ParameterAllocator& allocator);
  // x [T,H] -> [T,H]
  torch::Tensor forward(const torch::Tensor& x, const Batch& batch);

 private:
  torch::Tensor gate_up_proj_;  // [1,2I,H] or packed
  torch::Tensor down_proj_;     // [1,H,I] or packed
};
TORCH_MODULE(DenseMlp);

}  // namespace mixtral
