#include "decode_graphs.h"

#include <algorithm>
#include <string>

#ifdef MIXTRAL_WITH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#endif

namespace mixtral {

int64_t DecodeGraphs::padding_tokens(int64_t sequences) {
  // More than half of a padded batch is real.
  return round_up_to_power_of_two(std::min(sequences, kMaxSequences)) / 2;
}

torch::Tensor DecodeGraphs::logits(const std::vector<RollingKVCache::Chunk>& chunks) {
  HostBatch batch = cache_.lay_out(chunks);
  const int64_t sequences = batch.sequences();
  batch.pad(round_up_to_power_of_two(sequences), cache_.padding_slot());
  const auto sizes = std::make_pair(batch.sequences(), batch.columns);
  auto found = buckets_.find(sizes);
  if (found == buckets_.end())
    found = buckets_.emplace(sizes, Bucket{BatchBuffer(sizes.first, sizes.first, sizes.second, model_.device())}).first;
  Bucket& bucket = found->second;
  bucket.inputs.fill(batch);
  if (bucket.warm && enabled_ && !bucket.graph) capture(bucket);
  bucket.warm = true;
  if (bucket.graph) {
    replay(bucket);
    return bucket.logits.narrow(0, 0, sequences);
  }
  return run(bucket).narrow(0, 0, sequences);
}

torch::Tensor DecodeGraphs::run(const Bucket& bucket) {
  return model_.logits(model_.hidden_states(bucket.inputs.batch(), &cache_));
}

#ifdef MIXTRAL_WITH_CUDA

void DecodeGraphs::capture(Bucket& bucket) {
  if (!model_.device().is_cuda()) return;
  try {
    const c10::cuda::CUDAGuard device(model_.device());
    c10::cuda::device_synchronize();
    // The default stream cannot be captured. Other threads may go on using the device.
    const c10::cuda::CUDAStreamGuard stream(c10::cuda::getStreamFromPool());
    const auto graph = std::make_shared<at::cuda::CUDAGraph>();
    graph->capture_begin(memory_pool_, cudaStreamCaptureModeThreadLocal);
    try {
      bucket.logits = run(bucket);
    } catch (...) {
      graph->capture_end();  // the stream leaves capture mode, whatever else this throws
      throw;
    }
    graph->capture_end();
    memory_pool_ = graph->pool();
    bucket.graph = graph;
  } catch (const std::exception& error) {
    enabled_ = false;
    const std::string what = error.what();
    TORCH_WARN("decoding goes on without CUDA graphs: ", what.substr(0, what.find('\n')));
  }
}

void DecodeGraphs::replay(Bucket& bucket) { bucket.graph->replay(); }

#else

void DecodeGraphs::capture(Bucket&) {}
void DecodeGraphs::replay(Bucket&) {}

#endif

}  // namespace mixtral
