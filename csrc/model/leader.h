// Rank 0 of a model that is split over ranks: what it is called for, it tells the other ranks, which follow
// (follower.h).
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "../distributed/communicator.h"
#include "batch.h"
#include "libtorch.h"
#include "placement.h"
#include "rank_message.h"
#include "rolling_kv_cache.h"

namespace mixtral {

// A forward pass that was started. Every one must be finished.
struct Pass {
  Batch batch;
  RollingKVCache* cache = nullptr;
  int64_t number = 0;            // of the passes with ranks
  std::vector<int64_t> message;  // for the other ranks of the last stage
};

// Several threads may use it, as they may a model of one rank. RankError: see Communicator; after the first, every call
// throws the same.
class Leader {
 public:
  Leader(std::shared_ptr<Communicator> world, const Placement& placement);
  ~Leader();  // stop()

  // The stages before the last one begin with the pass.
  Pass start(const Batch& batch, RollingKVCache* cache);
  // Calls `compute` while the other ranks of the last stage do the same. In the order of start().
  torch::Tensor finish(const Pass& pass, const std::function<torch::Tensor()>& compute);
  // Calls `compute` while the other ranks of the last stage do the same with these rows, hidden [T,H].
  torch::Tensor logits(const torch::Tensor& hidden, const std::function<torch::Tensor()>& compute);

  // The sum of sampled_weights() of all ranks, of which `own` is this one's. Waits until nothing is computed.
  uint64_t weight_hash(uint64_t own);

  // The followers answer, and go on waiting for another while. Does nothing while something is computed.
  void ping();
  // The followers return. Nothing can be computed any more.
  void stop() noexcept;

 private:
  struct KnownCache {
    int64_t number;
    std::weak_ptr<const void> lifetime;
  };

  template <typename Body>
  auto guarded(const Body& body);
  void tell(int first_rank, int end_rank, const RankMessage& message);
  std::vector<int64_t> ask(Command command);
  void drop_caches();
  int64_t number_of(const RollingKVCache& cache);

  std::shared_ptr<Communicator> world_;
  const int process_;     // a fork of it has no followers
  const int stage_size_;  // ranks of the last stage, of which this is the first
  std::mutex mutex_;      // of everything below, and of world_
  std::condition_variable finished_one_;
  int64_t started_ = 0, finished_ = 0;
  std::vector<int64_t> messages_;  // sent to each rank
  std::vector<KnownCache> caches_;
  int64_t next_cache_ = 0;
  std::optional<RankError> failure_;
};

}  // namespace mixtral
