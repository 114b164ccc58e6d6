#include "transformer.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "observer.h"
#include "ops.h"
#include "router_record.h"
#include "sampled_weights.h"

namespace mixtral {
namespace {

// Below autograd nothing is recorded, and the gradient formulas that Python registers for the ops do not run.
using NoAutograd = at::AutoDispatchBelowAutograd;

// The configuration of a model of the layers and key/value heads of one rank. Throws as the constructor of the model.
Config part_of(const Config& config, const Placement& placement) {
  config.validate("config");
  placement.check(config);
  Config part = config;
  part.num_layers = placement.end_layer(config) - placement.first_layer(config);
  part.num_kv_heads = placement.num_kv_heads(config);
  part.num_heads = placement.num_heads(config);
  return part;
}

constexpr int64_t kDrawnAtOnce = 1 << 22;  // random values, in f32

// Packed blocks of one draw, over and over where there are more: packing takes far longer than copying.
template <typename Normal>
void init_random_packed(const torch::Tensor& parameter, Packing packing, const Normal& normal) {
  const auto blocks = parameter.flatten(0, 1);
  const int64_t cols = ops::unpack_weight(blocks.narrow(0, 0, 1).unsqueeze(0)).size(2);
  const int64_t count = std::clamp(kDrawnAtOnce / (kPackedRows * cols), int64_t{1}, blocks.size(0));
  const auto dtype = is_quantized(packing) ? torch::kBFloat16 : parameter.scalar_type();
  const auto drawn = pack_rows(normal({count * kPackedRows, cols}).to(torch::kCPU, dtype), packing);
  for (const auto& piece : blocks.split(count)) piece.copy_(drawn.narrow(0, 0, piece.size(0)));
}

}  // namespace

DecoderLayerImpl::DecoderLayerImpl(const Config& config, int64_t layer, const ParameterAllocator& allocator,
                                   const Placement& placement, const TensorGroup& group)
    : layer_(layer), eps_(config.rms_norm_eps) {
  const std::string path = "layers." + std::to_string(layer) + ".";
  input_layernorm_ = allocator.add(*this, path, "input_layernorm");
  post_attention_layernorm_ = allocator.add(*this, path, "post_attention_layernorm");
  attention_ = register_module(
      "attention", Attention(config, layer - placement.first_layer(config), path, allocator, placement, group));
  if (config.is_moe()) {
    moe_ = register_module("moe", SparseMoe(config, path, allocator, placement, group));
  } else {
    mlp_ = register_module("mlp", DenseMlp(path, allocator, placement, group));
  }
}

HiddenState DecoderLayerImpl::forward(const HiddenState& state, const Batch& batch, RollingKVCache* cache) {
  torch::Tensor normed, sum = state.x;
  if (state.residual.defined()) {
    std::tie(normed, sum) = ops::add_rms_norm(state.x, state.residual, input_layernorm_, eps_);
  } else {
    normed = ops::rms_norm(state.x, input_layernorm_, eps_);
  }
  const auto attended = attention_->forward(normed, batch, cache);
  std::tie(normed, sum) = ops::add_rms_norm(attended, sum, post_attention_layernorm_, eps_);
  return {moe_ ? moe_->forward(normed, batch) : mlp_->forward(normed, batch), sum};
}

void DecoderLayerImpl::set_expert_runner(const std::shared_ptr<ExpertRunner>& runner) {
  if (moe_) moe_->set_runner(layer_, runner);
}

MixtralImpl::MixtralImpl(const Config& config, torch::ScalarType dtype, torch::Device device, Packing packing,
                         const Placement& placement, std::shared_ptr<Communicator> world, const ParameterMap& given)
    : config_(config),
      cache_config_(part_of(config, placement)),
      dtype_(dtype),
      device_(device),
      packing_(packing),
      placement_(placement),
      world_(std::move(world)),
      group_(placement, world_) {
  if (world_ && world_->size() > 1 && world_->device().type() != device.type()) {
    throw std::invalid_argument("a model on " + device.str() + " needs ranks that exchange tensors there, got a " +
                                world_->device().str() + " backend");
  }
  const ParameterAllocator allocator(config, dtype, device, packing, placement, given);
  const bool first = placement.is_first_stage(), last = placement.is_last_stage(), tied = config.tie_word_embeddings;
  if (first || (last && tied)) embed_tokens_ = allocator.add(*this, "", "embed_tokens");
  const auto layers = register_module("layers", std::make_shared<torch::nn::Module>("layers"));
  for (int64_t layer = placement.first_layer(config); layer < placement.end_layer(config); ++layer) {
    layers_.emplace_back(config, layer, allocator, placement, group_);
    layers->register_module(std::to_string(layer), layers_.back());
  }
  if (last) {
    norm_ = allocator.add(*this, "", "norm");
    lm_head_ = tied ? embed_tokens_ : allocator.add(*this, "", "lm_head");
  }
  for (const Parameter& parameter : placed_parameters(config, placement))
    if (parameter.name == "lm_head") cuts_lm_head_ = shard_of(parameter, config, placement).shape != parameter.shape;
  if (world_ && world_->rank() == 0 && world_->size() > 1) leader_ = std::make_unique<Leader>(world_, placement);
}

torch::Tensor MixtralImpl::forward(const torch::Tensor& input_ids) {
  if (input_ids.dim() != 2 || input_ids.scalar_type() != torch::kInt64) {
    throw std::invalid_argument("Mixtral: input_ids must be int64 [B, S], got " +
                                std::string(torch::toString(input_ids.scalar_type())) + " " +
                                c10::str(input_ids.sizes()));
  }
  const int64_t batch_size = input_ids.size(0), length = input_ids.size(1);
  const auto ids = input_ids.to(torch::kCPU).contiguous();
  const int64_t* row = ids.data_ptr<int64_t>();
  check_ids(row, ids.numel());
  std::vector<std::vector<int64_t>> sequences;
  for (int64_t b = 0; b < batch_size; ++b, row += length) sequences.emplace_back(row, row + length);
  return logits(hidden_states(packed_batch(sequences, device()))).view({batch_size, length, config_.vocab_size});
}

torch::Tensor MixtralImpl::hidden_states(const Batch& batch, RollingKVCache* cache) {
  return finish(start(batch, cache));
}

Pass MixtralImpl::start(const Batch& batch, RollingKVCache* cache) {
  if (placement_.is_whole()) return {batch, cache, 0, {}};
  if (!leader_) throw std::logic_error("Mixtral: rank 0 is the one to be called, with all ranks of the model");
  if (batch.observer) require_whole("an observer");
  const auto ids = batch.input_ids.cpu();
  check_ids(ids.data_ptr<int64_t>(), ids.numel());  // as long as this rank alone knows of them
  return leader_->start(batch, cache);
}

torch::Tensor MixtralImpl::finish(const Pass& pass) {
  const auto compute = [&] { return compute_stage(pass.batch, pass.cache); };
  return leader_ ? leader_->finish(pass, compute) : compute();
}

torch::Tensor MixtralImpl::logits(const torch::Tensor& hidden) {
  if (!leader_ || !cuts_lm_head_ || hidden.size(0) == 0) return compute_logits(hidden);
  return leader_->logits(hidden.contiguous(), [&] { return compute_logits(hidden); });
}

torch::Tensor MixtralImpl::compute_stage(const Batch& batch, RollingKVCache* cache) {
  const NoAutograd guard;
  HiddenState state = first_state(batch);
  for (auto& layer : layers_) {
    if (world_) world_->keep_alive();
    state = layer->forward(state, batch, cache);
  }
  if (!placement_.is_last_stage()) send_to_next_stage(state, batch);
  if (batch.routing && placement_.tensor_rank == 0) gather_routing(*batch.routing);
  if (!placement_.is_last_stage()) return {};
  return std::get<0>(ops::add_rms_norm(state.x, state.residual, norm_, config_.rms_norm_eps));
}

HiddenState MixtralImpl::first_state(const Batch& batch) {
  const int64_t first_layer = placement_.first_layer(config_);
  if (batch.routing) batch.routing->begin(first_layer);
  if (placement_.is_first_stage()) return {torch::embedding(embed_tokens_, batch.input_ids), {}};
  const auto receive = [&] {
    const auto rows =
        torch::empty({batch.input_ids.size(0), config_.hidden_size}, torch::dtype(dtype_).device(device_));
    if (rows.numel() > 0) world_->receive(rows, peer_in_stage(placement_.stage - 1));
    return rows;
  };
  const auto sum = receive();
  if (batch.routing && batch.routing->keeps_logits()) batch.routing->begin(first_layer, receive());
  return {sum, {}};
}

int MixtralImpl::peer_in_stage(int stage) const {
  return placement_.stage_ranks(stage)[static_cast<size_t>(placement_.tensor_rank)];
}

// As one tensor. The next norm would begin with the same sum, rounded the same way.
void MixtralImpl::send_to_next_stage(const HiddenState& state, const Batch& batch) {
  if (state.x.numel() == 0) return;
  const int next = peer_in_stage(placement_.stage + 1);
  world_->send(state.x + state.residual, next);
  if (batch.routing && batch.routing->keeps_logits()) world_->send(batch.routing->last_x(), next);
}

// From the first rank of each earlier stage to rank 0.
void MixtralImpl::gather_routing(RouterRecord& routing) const {
  if (!placement_.is_last_stage()) return routing.send(*world_, /*to=*/0);
  for (Placement of = placement_; of.stage-- > 0;)
    routing.receive(*world_, of.rank(), of.end_layer(config_) - of.first_layer(config_), of.is_first_stage());
}

torch::Tensor MixtralImpl::compute_logits(const torch::Tensor& hidden) {
  const NoAutograd guard;
  Batch rows;
  rows.offs = torch::full({1}, hidden.size(0), torch::dtype(torch::kInt32).device(hidden.device()));
  torch::Tensor logits = ops::linear(hidden, lm_head_, rows);
  if (cuts_lm_head_) logits = group_.gather_columns_to_first(logits);
  return logits.defined() ? logits.to(torch::kFloat32) : logits;
}

void MixtralImpl::ping() {
  if (leader_) leader_->ping();
}

void MixtralImpl::stop() {
  if (leader_) leader_->stop();
}

void MixtralImpl::require_whole(const std::string& what) const {
  if (placement_.is_whole()) return;
  throw std::invalid_argument(what + ": needs the whole model in one process, this one is split over " +
                              std::to_string(placement_.world_size()) + " ranks");
}

uint64_t MixtralImpl::weight_hash() const {
  const uint64_t own = sampled_weights(*this);
  return leader_ ? leader_->weight_hash(own) : own;
}

void MixtralImpl::set_expert_runner(const std::shared_ptr<ExpertRunner>& runner) {
  expert_runner_ = runner;
  for (DecoderLayer& layer : layers_) layer->set_expert_runner(runner);
}

void MixtralImpl::init_random(uint64_t seed) {
  require_whole("init_random");
  const torch::NoGradGuard no_grad;
  auto generator = at::globalContext().defaultGenerator(device()).clone();
  generator.set_current_seed(seed);
  const auto normal = [&](std::vector<int64_t> shape) {
    return torch::empty(shape, torch::dtype(torch::kFloat32).device(device())).normal_(0, 0.02, generator);
  };
  for (const auto& item : named_parameters()) {
    const torch::Tensor& parameter = item.value();
    if (parameter.dim() == 1) {
      parameter.fill_(item.key().find("select_bias") == std::string::npos ? 1 : 0);
    } else if (is_packed(parameter)) {
      init_random_packed(parameter, packing_, normal);
    } else {
      for (const auto& piece : parameter.view(-1).split(kDrawnAtOnce)) piece.copy_(normal({piece.size(0)}));
    }
  }
}

void MixtralImpl::check_ids(const int64_t* ids, int64_t count) const {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= config_.vocab_size) {
      throw std::invalid_argument("Mixtral: token ids must be in [0, " + std::to_string(config_.vocab_size) +
                                  "), got " + std::to_string(ids[i]) + " at index " + std::to_string(i));
    }
  }
}

}  // namespace mixtral
