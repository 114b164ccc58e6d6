// The model: embedding, decoder layers, norm, lm_head. Whatever it computes is an op of the dispatcher namespace
// `mixtral`.
#pragma once

#include <torch/torch.h>

#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include "../checkpoint/weights.h"
#include "attention.h"
#include "config.h"
#include "memory.h"
#include "moe.h"
#include "packing.h"
#include "rolling_kv_cache.h"

namespace mixtral {

struct DecoderLayerImpl : torch::nn::Module {
  DecoderLayerImpl(const Config& config, int64_t layer, const torch::TensorOptions& options, Packing packing);
  // x [T,H] and residual [T,H] (undefined before the first layer) -> the same pair for the next layer, where the two
  // are added: the sum is folded into the next norm.
  std::pair<torch::Tensor, torch::Tensor> forward(const torch::Tensor& x, const torch::Tensor& residual,
                                                  const Batch& batch, RollingKVCache* cache);

 private:
  double eps_;
  torch::Tensor input_layernorm_, post_attention_layernorm_;  // [H]
  Attention attention_{nullptr};
  SparseMoe moe_{nullptr};  // one of these two
  DenseMlp mlp_{nullptr};
};
TORCH_MODULE(DecoderLayer);

class MixtralImpl : public torch::nn::Module {
 public:
  // Parameters are allocated and not initialised. Throws LoadError when `config` is not valid.
  MixtralImpl(const Config& config, torch::ScalarType dtype, torch::Device device, Packing packing = Packing::kNone);

  // input_ids int64 [B,S] -> logits f32 [B,S,vocab]. Throws std::invalid_argument when an id is outside the vocabulary.
  torch::Tensor forward(const torch::Tensor& input_ids);

  // The packed form. With a cache: write, then attend; without: block-diagonal over the batch itself. -> [T,H], normed.
  torch::Tensor hidden_states(const Batch& batch, RollingKVCache* cache = nullptr);
  // hidden [T,H] -> f32 [T,vocab]
  torch::Tensor logits(const torch::Tensor& hidden);

  // Normal(0, 0.02) weights and unit norms, drawn on the model's device from `seed`; packed matrices repeat the same
  // few million values. For tests and benchmarks.
  void init_random(uint64_t seed);

  // Throws std::invalid_argument unless every id is inside the vocabulary.
  void check_ids(const int64_t* ids, int64_t count) const;

  const Config& config() const { return config_; }
  torch::Device device() const { return embed_tokens_.device(); }
  torch::ScalarType dtype() const { return embed_tokens_.scalar_type(); }  // of activations
  WeightType weight_type() const { return {dtype(), packing_}; }

 private:
  Config config_;
  Packing packing_;
  torch::Tensor embed_tokens_;  // [vocab,H]
  std::vector<DecoderLayer> layers_;
  torch::Tensor norm_;     // [H]
  torch::Tensor lm_head_;  // [vocab,H] or packed; embed_tokens itself when the two are tied
};

struct LoadOptions {
  torch::Device device = torch::kCPU;
  std::string dtype = "auto";  // as in parse_weight_type
  LoadProgress progress = nullptr;
  bool pack = true;  // false: parameters have the shapes of weights.h; slower on the CPU
};

class Mixtral : public torch::nn::ModuleHolder<MixtralImpl> {
 public:
  using torch::nn::ModuleHolder<MixtralImpl>::ModuleHolder;
  // A Hugging Face or Mistral consolidated folder, or one that save_quantized wrote. Throws LoadError;
  // std::invalid_argument for a dtype that does not fit; OutOfMemory before anything is allocated.
  static Mixtral from_pretrained(const std::filesystem::path& folder, const LoadOptions& options = {});
};

}  // namespace mixtral
