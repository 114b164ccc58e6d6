#include "transformer.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/nn/modules/container/modulelist.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace mixtral {
namespace {

// Below autograd nothing is recorded, and the gradient formulas that Python registers for the ops do not run.
using NoAutograd = at::AutoDispatchBelowAutograd;

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

DecoderLayerImpl::DecoderLayerImpl(const Config& config, int64_t layer, const ParameterAllocator& allocator)
    : layer_(layer), eps_(config.rms_norm_eps) {
  const std::string path = "layers." + std::to_string(layer) + ".";
  input_layernorm_ = allocator.add(*this, path, "input_layernorm");
  post_attention_layernorm_ = allocator.add(*this, path, "post_attention_layernorm");
  attention_ = register_module("attention", Attention(config, layer, path, allocator));
  if (config.is_moe()) {
    moe_ = register_module("moe", SparseMoe(config, path, allocator));
  } else {
    mlp_ = register_module("mlp", DenseMlp(path, allocator));
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
                         const ParameterMap& given)
    : config_(config), packing_(packing) {
  config.validate("config");
  const ParameterAllocator allocator(config, dtype, device, packing, given);
  embed_tokens_ = allocator.add(*this, "", "embed_tokens");
  torch::nn::ModuleList list;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    layers_.emplace_back(config, layer, allocator);
    list->push_back(layers_.back());
  }
  register_module("layers", list);
  norm_ = allocator.add(*this, "", "norm");
  lm_head_ = config.tie_word_embeddings ? embed_tokens_ : allocator.add(*this, "", "lm_head");
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
  return final_norm(run_layers(0, config_.num_layers, embed(batch), batch, cache));
}

HiddenState MixtralImpl::embed(const Batch& batch) {
  const NoAutograd guard;
  return {torch::embedding(embed_tokens_, batch.input_ids), {}};
}

HiddenState MixtralImpl::run_layers(int64_t begin, int64_t end, HiddenState state, const Batch& batch,
                                    RollingKVCache* cache) {
  const NoAutograd guard;
  for (int64_t n = begin; n < end; ++n) state = layers_.at(static_cast<size_t>(n))->forward(state, batch, cache);
  return state;
}

torch::Tensor MixtralImpl::final_norm(const HiddenState& state) {
  const NoAutograd guard;
  return std::get<0>(ops::add_rms_norm(state.x, state.residual, norm_, config_.rms_norm_eps));
}

torch::Tensor MixtralImpl::logits(const torch::Tensor& hidden) {
  const NoAutograd guard;
  Batch rows;
  rows.offs = torch::full({1}, hidden.size(0), torch::dtype(torch::kInt32).device(hidden.device()));
  return ops::linear(hidden, lm_head_, rows).to(torch::kFloat32);
}

void MixtralImpl::set_expert_runner(const std::shared_ptr<ExpertRunner>& runner) {
  expert_runner_ = runner;
  for (DecoderLayer& layer : layers_) layer->set_expert_runner(runner);
}

void MixtralImpl::init_random(uint64_t seed) {
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
