// Owns the model, its key/value cache and its CUDA graphs: runs the passes that the scheduler plans.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../model/rolling_kv_cache.h"
#include "../model/transformer.h"
#include "decode_graphs.h"
#include "routing_counts.h"
#include "runner.h"
#include "scheduler.h"
#include "sequence.h"

namespace mixtral {

class ModelRunner : public Runner {
 public:
  struct Options {
    int64_t page_size;
    int64_t max_chunk;  // most tokens of one sequence in one pass
    int64_t max_batch;  // most sequences in one pass
    int64_t num_pages;  // of the page pool
    bool cuda_graph;
    std::shared_ptr<RoutingCounts> routing_counts = nullptr;  // gets what the routers decide
  };

  // Throws OutOfMemory when the page pool does not fit the device.
  ModelRunner(Mixtral model, Options options);

  // In one forward pass for each number of experts per token.
  std::vector<std::pair<Sequence*, Sample>> run(const std::vector<Scheduler::Chunk>& plan) override;
  Sample sample_held(Sequence& sequence) const override;
  RollingKVCache& cache() override { return cache_; }

 private:
  std::vector<std::pair<Sequence*, Sample>> run_pass(const std::vector<Scheduler::Chunk>& plan);
  torch::Tensor forward(const std::vector<RollingKVCache::Chunk>& chunks, const std::vector<int64_t>& rows,
                        int64_t experts_per_token, ForwardObserver* observer);
  torch::Tensor hold_constrained(std::vector<Sequence*>& sequences, const torch::Tensor& logits) const;
  std::vector<Sample> sample(const std::vector<Sequence*>& sequences, torch::Tensor logits);
  Sample sample_row(Sequence& sequence, int64_t token_id, const torch::Tensor& logits) const;

  Mixtral model_;
  std::shared_ptr<RoutingCounts> routing_counts_;
  bool uses_graphs_;
  RollingKVCache cache_;
  std::optional<DecodeGraphs> graphs_;  // of the cache
};

}  // namespace mixtral
