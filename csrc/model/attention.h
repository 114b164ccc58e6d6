// Grouped-query attention with a sliding window, over the rolling cache or over the batch itself.
#pragma once

#include "collectives.h"
#include "config.h"
#include "libtorch.h"
#include "packing.h"
#include "rolling_kv_cache.h"

namespace mixtral {

// A rank computes its own heads, and then, from the heads of all ranks, its own columns of the result.
struct AttentionImpl : torch::nn::Module {
  // layer: among those of this rank; path: "layers.N.", before the parameters' names.
  AttentionImpl(const Config& config, int64_t layer, const std::string& path, const ParameterAllocator& allocator,
                const Placement& placement, const TensorGroup& group);
  // x [T,H] -> [T,H], on every rank
  torch::Tensor forward(const torch::Tensor& x, const Batch& batch, RollingKVCache* cache);

 private:
  // x [T,H] -> [T,Nq*D]
  torch::Tensor attend(const torch::Tensor& x, const Batch& batch, RollingKVCache* cache);

  int64_t layer_, num_heads_, num_kv_heads_, head_dim_, window_;  // heads of this rank
  double rope_theta_;
  TensorGroup group_;
  torch::Tensor qkv_proj_;  // [(Nq+2Nkv)*D,H] or packed
  torch::Tensor o_proj_;    // [H,Nq*D] or packed; rows of this rank, columns of all
};
TORCH_MODULE(Attention);

}  // namespace mixtral
