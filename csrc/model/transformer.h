// The model: embedding, decoder layers, norm, lm_head. It is mathematics alone; checkpoint/from_pretrained.h reads one.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "attention.h"
#include "batch.h"
#include "config.h"
#include "expert_runner.h"
#include "libtorch.h"
#include "moe.h"
#include "packing.h"
#include "rolling_kv_cache.h"

namespace mixtral {

// The residual stream between two layers: `residual` and `x`, whose sum is folded into the next norm.
struct HiddenState {
  torch::Tensor x;         // [T,H]
  torch::Tensor residual;  // [T,H]; undefined before the first layer
};

struct DecoderLayerImpl : torch::nn::Module {
  DecoderLayerImpl(const Config& config, int64_t layer, const ParameterAllocator& allocator);
  HiddenState forward(const HiddenState& state, const Batch& batch, RollingKVCache* cache);
  void set_expert_runner(const std::shared_ptr<ExpertRunner>& runner);

 private:
  int64_t layer_;
  double eps_;
  torch::Tensor input_layernorm_, post_attention_layernorm_;  // [H]
  Attention attention_{nullptr};
  SparseMoe moe_{nullptr};  // one of these two
  DenseMlp mlp_{nullptr};
};
TORCH_MODULE(DecoderLayer);

class MixtralImpl : public torch::nn::Module {
 public:
  // Parameters that are not `given` (packing.h) are allocated and not initialised. Throws LoadError when `config` is
  // not valid.
  MixtralImpl(const Config& config, torch::ScalarType dtype, torch::Device device, Packing packing = Packing::kNone,
              const ParameterMap& given = {});

  // input_ids int64 [B,S] -> logits f32 [B,S,vocab]. Throws std::invalid_argument when an id is outside the vocabulary.
  torch::Tensor forward(const torch::Tensor& input_ids);

  // The packed form. With a cache: write, then attend; without: block-diagonal over the batch itself. -> [T,H], normed.
  // It is embed, all layers and final_norm.
  torch::Tensor hidden_states(const Batch& batch, RollingKVCache* cache = nullptr);
  // hidden [T,H] -> f32 [T,vocab]
  torch::Tensor logits(const torch::Tensor& hidden);

  // The stages of hidden_states, for a pipeline.
  HiddenState embed(const Batch& batch);
  HiddenState run_layers(int64_t begin, int64_t end, HiddenState state, const Batch& batch, RollingKVCache* cache);
  torch::Tensor final_norm(const HiddenState& state);  // -> [T,H]

  // From now on `runner` computes the experts of all layers.
  void set_expert_runner(const std::shared_ptr<ExpertRunner>& runner);
  const std::shared_ptr<ExpertRunner>& expert_runner() const { return expert_runner_; }  // or null

  // Normal(0, 0.02) weights, unit norms and zero biases, drawn on the model's device from `seed`; packed matrices
  // repeat the same few million values. For tests and benchmarks.
  void init_random(uint64_t seed);

  // Throws std::invalid_argument unless every id is inside the vocabulary.
  void check_ids(const int64_t* ids, int64_t count) const;

  const Config& config() const { return config_; }
  torch::Device device() const { return embed_tokens_.device(); }
  torch::ScalarType dtype() const { return embed_tokens_.scalar_type(); }  // of activations
  WeightType weight_type() const { return {dtype_name(dtype()), packing_}; }

 private:
  Config config_;
  Packing packing_;
  torch::Tensor embed_tokens_;  // [vocab,H]
  std::vector<DecoderLayer> layers_;
  torch::Tensor norm_;     // [H]
  torch::Tensor lm_head_;  // [vocab,H] or packed; embed_tokens itself when the two are tied
  std::shared_ptr<ExpertRunner> expert_runner_;
};

TORCH_MODULE(Mixtral);

}  // namespace mixtral
