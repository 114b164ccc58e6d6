// The model: embedding, decoder layers, norm, lm_head. It is mathematics alone; checkpoint/from_pretrained.h reads one.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "../distributed/communicator.h"
#include "attention.h"
#include "batch.h"
#include "collectives.h"
#include "config.h"
#include "expert_runner.h"
#include "leader.h"
#include "libtorch.h"
#include "moe.h"
#include "packing.h"
#include "placement.h"
#include "rolling_kv_cache.h"

namespace mixtral {

// The residual stream between two layers: `residual` and `x`, whose sum is folded into the next norm.
struct HiddenState {
  torch::Tensor x;         // [T,H]
  torch::Tensor residual;  // [T,H]; undefined before the first layer
};

struct DecoderLayerImpl : torch::nn::Module {
  DecoderLayerImpl(const Config& config, int64_t layer, const ParameterAllocator& allocator, const Placement& placement,
                   const TensorGroup& group);
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

// The whole model, or the part that one rank of several holds. Of such a model rank 0 is called, as if it had the
// whole; the other ranks follow (follower.h). What happens to the ranks is a RankError of the call.
class MixtralImpl : public torch::nn::Module {
 public:
  // Parameters that are not `given` (packing.h) are allocated and not initialised. world: the ranks that hold the other
  // parts; without them, a part can only be loaded. Throws LoadError when `config` is not valid, std::invalid_argument
  // for a placement that does not fit it or this rank.
  MixtralImpl(const Config& config, torch::ScalarType dtype, torch::Device device, Packing packing = Packing::kNone,
              const Placement& placement = {}, std::shared_ptr<Communicator> world = nullptr,
              const ParameterMap& given = {});

  // input_ids int64 [B,S] -> logits f32 [B,S,vocab]. Throws std::invalid_argument when an id is outside the vocabulary.
  torch::Tensor forward(const torch::Tensor& input_ids);

  // The packed form. With a cache: write, then attend; without: block-diagonal over the batch itself. -> [T,H], normed.
  // The cache is one of cache_config().
  torch::Tensor hidden_states(const Batch& batch, RollingKVCache* cache = nullptr);
  // The same in two steps. The stages of a pipeline compute one pass each at a time when as many are started before the
  // first one is finished. Passes are finished in the order in which they were started; a sequence is in one at a time.
  // start() throws std::invalid_argument for an observer of a model that is split over ranks.
  Pass start(const Batch& batch, RollingKVCache* cache = nullptr);
  torch::Tensor finish(const Pass& pass);
  // hidden [T,H] -> f32 [T,vocab]
  torch::Tensor logits(const torch::Tensor& hidden);

  // What this rank does of the two. -> [T,H], undefined before the last stage; f32 [T,vocab], undefined but on rank 0.
  torch::Tensor compute_stage(const Batch& batch, RollingKVCache* cache);
  torch::Tensor compute_logits(const torch::Tensor& hidden);
  // Rank 0 of several. While nothing is computed, it must tell the others, more often than their time for waiting, that
  // they are still needed; stop() ends them, as does the end of this model.
  void ping();
  void stop();

  // Of a sample of the weights of all ranks: the same for the same model in every layout.
  uint64_t weight_hash() const;

  // From now on `runner` computes the experts of all layers.
  void set_expert_runner(const std::shared_ptr<ExpertRunner>& runner);
  const std::shared_ptr<ExpertRunner>& expert_runner() const { return expert_runner_; }  // or null

  // Normal(0, 0.02) weights, unit norms and zero biases, drawn on the model's device from `seed`; packed matrices
  // repeat the same few million values. For tests and benchmarks.
  void init_random(uint64_t seed);

  // Throws std::invalid_argument unless every id is inside the vocabulary.
  void check_ids(const int64_t* ids, int64_t count) const;

  const Config& config() const { return config_; }  // of the whole model
  // Of the layers and key/value heads that this rank holds: what its RollingKVCache is made for.
  const Config& cache_config() const { return cache_config_; }
  const Placement& placement() const { return placement_; }
  const std::shared_ptr<Communicator>& world() const { return world_; }  // null for one rank
  // Throws std::invalid_argument about `what` unless this is the whole model.
  void require_whole(const std::string& what) const;
  torch::Device device() const { return device_; }
  torch::ScalarType dtype() const { return dtype_; }  // of activations
  WeightType weight_type() const { return {dtype_name(dtype()), packing_}; }

 private:
  HiddenState first_state(const Batch& batch);
  void send_to_next_stage(const HiddenState& state, const Batch& batch);
  int peer_in_stage(int stage) const;
  void gather_routing(RouterRecord& routing) const;

  Config config_, cache_config_;
  torch::ScalarType dtype_;
  torch::Device device_;
  Packing packing_;
  Placement placement_;
  std::shared_ptr<Communicator> world_;
  TensorGroup group_;
  // Of this rank; undefined where another stage has it.
  torch::Tensor embed_tokens_;  // [vocab,H]
  std::vector<DecoderLayer> layers_;
  torch::Tensor norm_;              // [H]
  torch::Tensor lm_head_;           // [vocab,H] or packed; embed_tokens itself when the two are tied
  bool cuts_lm_head_ = false;       // every rank of the last stage has some of its rows
  std::unique_ptr<Leader> leader_;  // on rank 0 of several
  std::shared_ptr<ExpertRunner> expert_runner_;
};

TORCH_MODULE(Mixtral);

}  // namespace mixtral
