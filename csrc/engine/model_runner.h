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
#include "scheduler.h"
#include "sequence.h"

namespace mixtral {

class ModelRunner {
 public:
  struct Options {
    int64_t page_size;
    int64_t max_chunk;  // most tokens of one sequence in one pass
    int64_t max_batch;  // most sequences in one pass
    int64_t kv_memory;  // most bytes of the page pool; 0: as much as the device has
    bool cuda_graph;
    std::shared_ptr<RoutingCounts> routing_counts = nullptr;  // gets what the routers decide
  };

  ModelRunner(Mixtral model, Options options);

  // Most pages that a request holds at a time.
  int64_t pages_needed(int64_t prompt_tokens, int64_t max_tokens) const;
  // Makes the page pool larger: to `wanted` pages, or to as many as memory has room for, but no fewer than `least`.
  // A pool without sequences is dropped first. Throws OutOfMemory.
  void grow(int64_t least, int64_t wanted);
  int64_t num_pages() const { return cache_ ? cache_->num_pages() : 0; }
  int64_t pages_in_use() const { return cache_ ? cache_->pages_in_use() : 0; }
  RollingKVCache& cache() { return cache_.value(); }

  // Computes the tokens of the plan and counts them as computed, in one forward pass for each number of experts per
  // token. Returns a sample for each sequence all of whose tokens are computed now; of a constrained one it keeps the
  // logits instead.
  std::vector<std::pair<Sequence*, Sample>> run(const std::vector<Scheduler::Chunk>& plan);
  // Picks the next token of a constrained sequence, from its logits and mask.
  Sample sample_held(Sequence& sequence) const;

  MixtralImpl& model() { return *model_; }

 private:
  int64_t affordable_pages() const;
  std::vector<std::pair<Sequence*, Sample>> run_pass(const std::vector<Scheduler::Chunk>& plan);
  torch::Tensor forward(const std::vector<RollingKVCache::Chunk>& chunks, const std::vector<int64_t>& rows,
                        int64_t experts_per_token, ForwardObserver* observer);
  torch::Tensor hold_constrained(std::vector<Sequence*>& sequences, const torch::Tensor& logits) const;
  std::vector<Sample> sample(const std::vector<Sequence*>& sequences, torch::Tensor logits);
  Sample sample_row(Sequence& sequence, int64_t token_id, const torch::Tensor& logits) const;

  Mixtral model_;
  Options options_;
  bool uses_graphs_;
  std::optional<RollingKVCache> cache_;
  std::optional<DecodeGraphs> graphs_;  // of the cache
};

}  // namespace mixtral
