// Decoding in CUDA graphs: one launch instead of the hundreds of kernel launches of a decode step.
//
// A graph is bound to sizes and addresses. So the batch is padded to a power of two of sequences, and its page table to
// a power of two of columns; each pair of sizes is a bucket with input buffers that stay in place and a graph of its
// own. The first step of a bucket runs without a graph: what kernels set up once must not be captured.
//
// Without CUDA every step runs that way: padding and buffers are the same on all devices.
#pragma once

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "../model/rolling_kv_cache.h"
#include "../model/transformer.h"

namespace at::cuda {
struct CUDAGraph;
}

namespace mixtral {

class DecodeGraphs {
 public:
  static constexpr int64_t kMaxSequences = 64;
  // Padding tokens that a cache needs room for when at most `sequences` sequences are decoded at a time.
  static int64_t padding_tokens(int64_t sequences);

  // Both must outlive this object, and the pool must stay where it is.
  DecodeGraphs(MixtralImpl& model, RollingKVCache& cache) : model_(model), cache_(cache) {}

  // The next token of each of at most kMaxSequences sequences -> f32 [B,vocab]. The next call overwrites the result:
  // read it on the host before.
  torch::Tensor logits(const std::vector<RollingKVCache::Chunk>& chunks);

 private:
  struct Bucket {
    explicit Bucket(BatchBuffer buffer) : inputs(std::move(buffer)) {}
    BatchBuffer inputs;
    bool warm = false;
    std::shared_ptr<at::cuda::CUDAGraph> graph;  // none before the second step, or if graphs do not work
    torch::Tensor logits;                        // what the graph writes
  };
  torch::Tensor run(const Bucket& bucket);
  void capture(Bucket& bucket);
  void replay(Bucket& bucket);

  MixtralImpl& model_;
  RollingKVCache& cache_;
  std::map<std::pair<int64_t, int64_t>, Bucket> buckets_;  // by padded sequences and page-table columns
  std::pair<uint64_t, uint64_t> memory_pool_ = {0, 0};     // shared by all graphs: only one runs at a time
  bool enabled_ = true;
};

}  // namespace mixtral
