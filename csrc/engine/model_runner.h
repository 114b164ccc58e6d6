// Owns the model, its key/value cache and its CUDA graphs: runs the passes that the scheduler plans.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "../model/rolling_kv_cache.h"
#include "../model/transformer.h"
#include "decode_graphs.h"
#include "routing_counts.h"
#include "scheduler.h"
#include "sequence.h"

namespace mixtral {

// The rows of a pass with each number of experts per token.
using RowsByExperts = std::map<int64_t, std::vector<int64_t>>;

// What a pass picked for a sequence: the guesses of its draft that held, and one token more.
struct Step {
  Sequence* sequence;
  std::vector<Sample> samples;
};

class ModelRunner {
 public:
  struct Options {
    int64_t page_size;
    int64_t max_chunk;  // most tokens of one sequence in one pass
    int64_t max_batch;  // most sequences in one pass
    int64_t kv_memory;  // most bytes of the page pool; 0: as much as the device has
    bool cuda_graph;
    int64_t speculate = 0;                                    // most tokens of a draft
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

  // Computes the tokens of the plan in one forward pass, behind them the drafts, and picks tokens for the sequences all
  // of whose tokens are computed then; of a constrained one it keeps the logits instead. Counts the tokens as computed,
  // and the guesses that held. Never throws: a pass that runs out of memory is computed in two halves, and these
  // likewise; what goes wrong is the error of the sequences that it happened to (Sequence::error).
  std::vector<Step> run(const std::vector<Scheduler::Chunk>& plan);
  // Picks the next token of a constrained sequence, from its logits and mask.
  Sample sample_held(Sequence& sequence) const;

  MixtralImpl& model() { return *model_; }

 private:
  int64_t affordable_pages() const;
  struct Pass;
  std::vector<Step> run_halves(const std::vector<Scheduler::Chunk>& plan);
  Pass forward(const std::vector<Scheduler::Chunk>& plan);
  torch::Tensor logits(const std::vector<RollingKVCache::Chunk>& chunks, const std::vector<int64_t>& rows,
                       const RowsByExperts& experts, ForwardObserver* observer);
  void roll_back(const std::vector<Scheduler::Chunk>& plan);
  std::vector<Step> finish(Pass& pass);
  void count_routing(Pass& pass, const std::vector<Scheduler::Chunk>& plan, const std::vector<Step>& steps);
  void hold_constrained(Pass& pass) const;
  std::vector<Step> sample_and_compare(const Pass& pass);
  std::vector<Sample> sample(const std::vector<Sequence*>& sequences, torch::Tensor logits);
  Sample sample_row(Sequence& sequence, int64_t token_id, const torch::Tensor& logits) const;

  Mixtral model_;
  Options options_;
  bool uses_graphs_;
  std::optional<RollingKVCache> cache_;
  std::optional<DecodeGraphs> graphs_;  // of the cache
};

}  // namespace mixtral
