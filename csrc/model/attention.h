// Grouped-query attention with a sliding window, over the rolling cache or over the batch itself.
#pragma once

#include "config.h"
#include "libtorch.h"
#include "packing.h"
#include "rolling_kv_cache.h"

namespace mixtral {

struct AttentionImpl : torch::nn::Module {
  // path: "layers.N.", before the parameters' names.
  AttentionImpl(const Config& config, int64_t layer, const std::string& path, const ParameterAllocator& allocator);
  // x [T,H] -> [T,H]
  torch::Tensor forward(const torch::Tensor& x, const Batch& batch, RollingKVCache* cache);

 private:
  int64_t layer_, num_heads_, num_kv_heads_, head_dim_, window_;
  double rope_theta_;
  torch::Tensor qkv_proj_;  // [(Nq+2Nkv)*D,H] or packed
  torch::Tensor o_proj_;    // [H,Nq*D] or packed
};
TORCH_MODULE(Attention);

}  // namespace mixtral
