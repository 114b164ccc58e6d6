// Decoding in CUDA graphs: the hundreds of kernel launches of a step, with one token per sequence, become a single one.
//
// A graph is bound to its sizes and addresses. So the batch is padded to a power of two of sequences, as its page table
// is to one of columns; its inputs lie in a buffer that stays; and there is one graph for each pair of sizes. The first
// step of a pair runs without a graph, to warm up: what kernels set up once must not fall into the capture.
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
  // The padding tokens that a cache must have room for, where at most `sequences` are decoded at a time.
  static int64_t padding_tokens(int64_t sequences);

  // Both must outlive this object.
  DecodeGraphs(MixtralImpl& model, RollingKVCache& cache) : model_(model), cache_(cache) {}

  // The next token of each of at most kMaxSequences sequences -> f32 [B,vocab]. The next call may overwrite the result,
  // and must come after it was read on the host.
  torch::Tensor logits(const std::vector<RollingKVCache::Chunk>& chunks);

 private:
  struct Step {
    explicit Step(BatchBuffer buffer) : inputs(std::move(buffer)) {}
    BatchBuffer inputs;
    bool warm = false;
    std::shared_ptr<at::cuda::CUDAGraph> graph;  // none before it is warm, or where graphs do not work
    torch::Tensor logits;                        // what the graph writes
  };
  torch::Tensor run(const Step& step);
  void capture(Step& step);
  void replay(Step& step);

  MixtralImpl& model_;
  RollingKVCache& cache_;
  std::map<std::pair<int64_t, int64_t>, Step> steps_;   // by padded sequences and page-table columns
  std::pair<uint64_t, uint64_t> memory_pool_ = {0, 0};  // shared by all graphs, of which one runs at a time
  bool enabled_ = true;
};

}  // namespace mixtral
