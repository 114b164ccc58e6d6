// The feed-forward block: a sparse mixture of experts, or one dense expert as in Mistral 7B.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "batch.h"
#include "collectives.h"
#include "config.h"
#include "expert_runner.h"
#include "libtorch.h"
#include "packing.h"

namespace mixtral {

// Every rank routes all tokens. With expert parallelism a rank then computes for its own experts, otherwise for all of
// them with a part of their intermediate size.
struct SparseMoeImpl : torch::nn::Module {
  // path: "layers.N.", before the parameters' names.
  SparseMoeImpl(const Config& config, const std::string& path, const ParameterAllocator& allocator,
                const Placement& placement, const TensorGroup& group);
  // x [T,H] -> [T,H], on every rank
  torch::Tensor forward(const torch::Tensor& x, const Batch& batch);
  // From now on `runner` computes the experts, which it knows as those of `layer`; null: ops::moe_mlp does. Where ranks
  // have whole experts, it only hears which ones of this rank are computed.
  void set_runner(int64_t layer, const std::shared_ptr<ExpertRunner>& runner);

 private:
  std::tuple<torch::Tensor, torch::Tensor> route(const torch::Tensor& x, const Batch& batch);
  torch::Tensor expert_parallel(const torch::Tensor& x, const torch::Tensor& topk_weights,
                                const torch::Tensor& topk_ids);

  int64_t top_k_, num_experts_;
  bool renormalize_;
  TensorGroup group_;
  std::vector<int64_t> expert_ends_;          // of the experts of each rank; empty without expert parallelism
  torch::Tensor router_;                      // [E,H], f32 unless config.router_in_f32 is false
  std::optional<torch::Tensor> select_bias_;  // f32 [E]
  torch::Tensor gate_up_proj_;                // [E,2I,H] or packed; experts or I of this rank
  torch::Tensor down_proj_;                   // [E,H,I] or packed
  int64_t layer_ = 0;                         // for the runner
  std::shared_ptr<ExpertRunner> runner_;      // or null
};
TORCH_MODULE(SparseMoe);

// With expert parallelism a rank computes its part of the intermediate size, and then, from all of it, its own columns
// of the result; otherwise what its part of the intermediate size adds to the result.
struct DenseMlpImpl : torch::nn::Module {
  DenseMlpImpl(const std::string& path, const ParameterAllocator& allocator, const Placement& placement,
               const TensorGroup& group);
  // x [T,H] -> [T,H], on every rank
  torch::Tensor forward(const torch::Tensor& x, const Batch& batch);

 private:
  bool sums_;  // over the ranks
  TensorGroup group_;
  torch::Tensor gate_up_proj_;  // [1,2I,H] or packed; I of this rank
  torch::Tensor down_proj_;     // [1,H,I] or packed; H of this rank, or its I
};
TORCH_MODULE(DenseMlp);

}  // namespace mixtral
