// A small random model, split over ranks that are threads of this process.
#pragma once

#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "distributed/shm.h"
#include "engine/threads.h"
#include "model/follower.h"
#include "model/parameters.h"
#include "model/placement.h"
#include "tiny_model.h"

namespace mixtral {

struct Layout {
  int tensor_size = 1, stages = 1;
  bool expert_parallel = true;

  int ranks() const { return tensor_size * stages; }
  std::string name() const {
    return "Tp" + std::to_string(tensor_size) + "Pp" + std::to_string(stages) + (expert_parallel ? "" : "Megatron");
  }
};

// Sizes of which a quarter can be packed, in four layers.
inline Config splittable_config(int64_t num_experts = 8, int64_t window = 8) {
  Config config = tiny_config(num_experts, 2, window);
  config.hidden_size = 128;
  config.intermediate_size = 128;
  config.num_layers = 4;
  config.num_heads = 8;
  config.num_kv_heads = 4;
  config.head_dim = 32;
  config.vocab_size = 256;
  return config;
}

// What a rank holds of `whole`, a parameter that is not packed.
inline torch::Tensor part_of_parameter(const torch::Tensor& whole, const ParameterShard& shard) {
  const auto matrix = whole.view({-1, whole.size(-1)});
  std::vector<torch::Tensor> rows;
  for (const auto& [begin, end] : shard.rows) rows.push_back(matrix.slice(0, begin, end));
  return torch::cat(rows).narrow(1, shard.first_column, shard.columns).reshape(shard.shape);
}

// The part of `plain`, a model without packing, that a rank holds.
inline Mixtral part_of_model(const Mixtral& plain, Packing packing, const Placement& placement,
                             std::shared_ptr<Communicator> world) {
  const torch::NoGradGuard no_grad;
  const Config& config = plain->config();
  Mixtral part(config, plain->dtype(), torch::kCPU, packing, placement, std::move(world));
  const auto weights = plain->named_parameters();
  auto own = part->named_parameters();
  for (const Parameter& parameter : placed_parameters(config, placement)) {
    const auto weight = part_of_parameter(weights[parameter.name], shard_of(parameter, config, placement));
    torch::Tensor& to = own[parameter.name];
    if (is_packed(to)) {
      to.flatten(0, 1).copy_(pack_rows(weight.view({-1, weight.size(-1)}), packing));
    } else {
      to.copy_(weight);
    }
  }
  return part;
}

// Rank 0 is called; threads of this object follow it.
class SplitModel {
 public:
  SplitModel(const Mixtral& plain, Layout layout, Packing packing = Packing::kNone, double timeout = 300)
      : ranks_(shm_group(layout.ranks(), timeout)), errors_(ranks_.size()) {
    std::vector<Mixtral> parts;
    for (int rank = 0; rank < layout.ranks(); ++rank)
      parts.push_back(part_of_model(plain, packing,
                                    Placement::of_rank(rank, layout.tensor_size, layout.stages, layout.expert_parallel),
                                    ranks_[static_cast<size_t>(rank)]));
    leader_ = parts[0];
    for (size_t rank = 1; rank < parts.size(); ++rank) {
      threads_.emplace_back([this, rank, part = parts[rank], threads = num_threads()]() mutable {
        use_threads(threads);
        try {
          follow(*part);
        } catch (...) {
          errors_[rank] = std::current_exception();
        }
      });
    }
  }
  ~SplitModel() { stop(); }

  Mixtral& leader() { return leader_; }
  Communicator& rank(size_t rank) { return *ranks_[rank]; }
  // Ends the model, and so the followers -> what each rank failed with; empty: nothing.
  std::vector<std::string> stop() {
    leader_ = Mixtral(nullptr);
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    std::vector<std::string> texts;
    for (const auto& error : errors_) {
      try {
        if (error) std::rethrow_exception(error);
        texts.emplace_back();
      } catch (const std::exception& e) {
        texts.emplace_back(e.what());
      }
    }
    return texts;
  }

 private:
  std::vector<std::shared_ptr<Communicator>> ranks_;
  std::vector<std::exception_ptr> errors_;
  Mixtral leader_{nullptr};
  std::vector<std::thread> threads_;
};

}  // namespace mixtral
