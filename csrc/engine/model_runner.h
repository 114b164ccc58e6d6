// Owns the model, its key/value cache and its CUDA graphs: runs the passes that the scheduler plans.
#pragma once

#include <chrono>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
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
  ~ModelRunner() override;

  // One forward pass, whatever the numbers of experts per token. They throw nothing but RankError: a pass that runs out
  // of memory is computed in two halves, and these likewise; what goes wrong is the error of the sequences that it
  // happened to.
  void launch(const std::vector<Scheduler::Chunk>& plan) override;
  std::vector<Step> collect() override;
  Sample sample_held(Sequence& sequence) const override;
  RollingKVCache& cache() override { return cache_; }
  double pass_seconds() const override { return pass_seconds_; }
  void ping() override { model_->ping(); }
  double ping_seconds() const override;

 private:
  using Clock = std::chrono::steady_clock;
  struct Pass;
  Pass start(const std::vector<Scheduler::Chunk>& plan);
  void start_model(Pass& pass, const std::vector<RollingKVCache::Chunk>& chunks);
  void finish_model(Pass& pass);
  std::vector<Step> finish(Pass pass);
  std::vector<Step> compute_halves(const std::vector<Scheduler::Chunk>& plan);
  void roll_back(const std::vector<Scheduler::Chunk>& plan);
  std::vector<Step> pick(Pass& pass);
  void hold_constrained(Pass& pass) const;
  std::vector<Step> sample_and_compare(const Pass& pass);
  std::vector<Sample> sample(const std::vector<Sequence*>& sequences, torch::Tensor logits);
  Sample sample_row(Sequence& sequence, int64_t token_id, const torch::Tensor& logits) const;

  Mixtral model_;
  std::shared_ptr<RoutingCounts> routing_counts_;
  bool uses_graphs_;
  RollingKVCache cache_;
  std::optional<DecodeGraphs> graphs_;  // of the cache
  std::list<Pass> passes_;              // in flight, the oldest first
  Clock::time_point collected_;         // the last one
  double pass_seconds_ = 0;
};

}  // namespace mixtral
