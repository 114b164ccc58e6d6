// Owns the model, its key/value cache and its CUDA graphs: runs the passes that the scheduler plans.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../model/rolling_kv_cache.h"
#include "../model/transformer.h"
#include "decode_graphs.h"
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
  };

  // Throws OutOfMemory when the page pool does not fit the device.
  ModelRunner(Mixtral model, Options options);

  // In one forward pass for each number of experts per token.
  std::vector<std::pair<Sequence*, Sample>> run(const std::vector<Scheduler::Chunk>& plan) override;
  RollingKVCache& cache() override { return cache_; }
  const std::vector<int64_t>& eos_token_ids() const override { return model_->config().eos_token_ids; }

 private:
  std::vector<std::pair<Sequence*, Sample>> run_pass(const std::vector<Scheduler::Chunk>& plan);
  torch::Tensor forward(const std::vector<RollingKVCache::Chunk>& chunks, const std::vector<int64_t>& rows,
                        int64_t experts_per_token, ForwardObserver* observer);
  std::vector<Sample> sample(const std::vector<Sequence*>& sequences, torch::Tensor logits);
  Sample sample_row(Sequence& sequence, int64_t token_id, const torch::Tensor& logits) const;

  Mixtral model_;
  bool uses_graphs_;
  RollingKVCache cache_;
  std::optional<DecodeGraphs> graphs_;  // of the cache
};

}  // namespace mixtral
