// The model: embedding, decoder layers, norm, lm_head. Every computation is an op of the dispatcher namespace `mixtral`.
#pragma once

#include "attention.h"
#include "config.h"
#include "moe.h"
#include "rolling_kv_cache.h"
#include "weights.h"

#include <torch/torch.h>

#include <filesystem>
#include <optional>
#include <vector>

namespace mixtral {

struct DecoderLayerImpl : torch::nn::Module {
  DecoderLayerImpl(const Config& config, int64_t layer, const torch::TensorOptions& options);
  // x [T,H] and residual [T,H] -> the same pair for the next layer: the sum is folded into the next norm.
  std::pair<torch::Tensor, torch::Tensor> forward(const torch::Tensor& x, const torch::Tensor& residual,
                                                  const Batch& batch, RollingKVCache* cache);
};

class MixtralImpl : public torch::nn::Module {
 public:
  // Parameters are allocated and not initialised.
  MixtralImpl(const Config& config, torch::ScalarType dtype, torch::Device device);

  // input_ids int64 [B,S] -> logits f32 [B,S,vocab]. Throws when an id is outside the vocabulary.
  torch::Tensor forward(const torch::Tensor& input_ids);

  // The packed form. With a cache: write, then attend; without: block-diagonal over the batch itself. -> [T,H], normed.
  torch::Tensor hidden_states(const Batch& batch, RollingKVCache* cache = nullptr);
  // hidden [T,H] -> f32 [T,vocab]
  torch::Tensor logits(const torch::Tensor& hidden);

  // Normal(0, 0.02) weights and unit norms from `seed`: for tests and benchmarks.
  void init_random(uint64_t seed);

  const Config& config() const { return config_; }
  torch::Device device() const;
  torch::ScalarType dtype() const;
};

struct LoadOptions {
  torch::Device device = torch::kCPU;
  std::optional<torch::ScalarType> dtype;  // none: the checkpoint's
  LoadProgress progress;
};

class Mixtral : public torch::nn::ModuleHolder<MixtralImpl> {
 public:
  using torch::nn::ModuleHolder<MixtralImpl>::ModuleHolder;
  // A Hugging Face or Mistral consolidated folder. Throws LoadError.
  static Mixtral from_pretrained(const std::filesystem::path& folder, const LoadOptions& options = {});
};

}  // namespace mixtral
