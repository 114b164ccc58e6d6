// Small random models for the tests, and the bits they must agree on.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "model/libtorch.h"
#include "model/transformer.h"

namespace mixtral {

// Two layers, grouped-query attention; num_experts 0 gives a dense model, window 0 none.
inline Config tiny_config(int64_t num_experts = 4, int64_t top_k = 2, int64_t window = 8) {
  Config config;
  config.hidden_size = 48;
  config.intermediate_size = 56;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 12;
  config.vocab_size = 101;
  config.max_position = 8192;
  config.num_experts = num_experts;
  config.top_k = num_experts > 0 ? top_k : 0;
  config.rms_norm_eps = 1e-5;
  config.rope_theta = 1e4;
  config.window = window;
  return config;
}

inline Config mixtral_8x7b() {
  Config config;
  config.hidden_size = 4096;
  config.intermediate_size = 14336;
  config.num_layers = 32;
  config.num_heads = 32;
  config.num_kv_heads = 8;
  config.head_dim = 128;
  config.vocab_size = 32000;
  config.max_position = 32768;
  config.num_experts = 8;
  config.top_k = 2;
  config.dtype = "bfloat16";
  return config;
}

// Weights ten times those of init_random: attention, routing and logits are far from uniform.
inline Mixtral tiny_model(const Config& config, torch::ScalarType dtype = torch::kFloat32, uint64_t seed = 1) {
  Mixtral model(config, dtype, torch::kCPU);
  model->init_random(seed);
  const torch::NoGradGuard no_grad;
  for (auto& parameter : model->parameters())
    if (parameter.dim() > 1) parameter.mul_(10);
  return model;
}

// The same with sizes that can be packed, lm_head's included.
inline Config packable_config(int64_t num_experts = 4, int64_t top_k = 2, int64_t window = 8) {
  Config config = tiny_config(num_experts, top_k, window);
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.head_dim = 16;
  config.vocab_size = 128;
  return config;
}

// A model with the weights of `plain`, its matrices packed.
inline Mixtral packed_model(const Mixtral& plain, Packing packing) {
  const torch::NoGradGuard no_grad;
  Mixtral model(plain->config(), plain->dtype(), torch::kCPU, packing);
  const auto weights = plain->named_parameters();
  for (auto& item : model->named_parameters()) {
    const torch::Tensor& weight = weights[item.key()];
    if (is_packed(item.value())) {
      item.value().flatten(0, 1).copy_(pack_rows(weight.view({-1, weight.size(-1)}), packing));
    } else {
      item.value().copy_(weight);
    }
  }
  return model;
}

inline std::vector<int64_t> random_ids(int64_t length, int64_t vocab, uint64_t seed) {
  auto generator = torch::make_generator<torch::CPUGeneratorImpl>(seed);
  const auto ids = torch::randint(vocab, {length}, generator, torch::kInt64);
  return {ids.data_ptr<int64_t>(), ids.data_ptr<int64_t>() + length};
}

// Hidden states of one sequence, computed whole and without a cache. -> [T,H]
inline torch::Tensor whole(Mixtral& model, const std::vector<int64_t>& ids) {
  return model->hidden_states(packed_batch({ids}, torch::kCPU));
}

// Hidden states of one sequence, computed through a rolling cache in chunks of `chunk` tokens. -> [T,H]
inline torch::Tensor chunked(Mixtral& model, const std::vector<int64_t>& ids, int64_t chunk, int64_t page_size = 4) {
  const int64_t length = static_cast<int64_t>(ids.size());
  const int64_t pages = RollingKVCache::pages_needed(model->config(), page_size, chunk, length);
  RollingKVCache cache(model->cache_config(), {page_size, pages, chunk, torch::kCPU, model->dtype()});
  const int64_t sequence = cache.add_sequence();
  std::vector<torch::Tensor> parts;
  for (int64_t begin = 0; begin < length; begin += chunk) {
    const auto first = ids.begin() + begin;
    const Batch batch = cache.prepare({{sequence, {first, first + std::min(chunk, length - begin)}}});
    parts.push_back(model->hidden_states(batch, &cache));
  }
  return torch::cat(parts);
}

// Equal bits, and something to compare.
inline ::testing::AssertionResult same_bits(const torch::Tensor& a, const torch::Tensor& b) {
  if (a.numel() == 0 || !torch::isfinite(a).all().item<bool>())
    return ::testing::AssertionFailure() << "empty or not finite";
  if (torch::equal(a, b)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "shapes " << a.sizes() << " and " << b.sizes() << ", largest difference "
                                       << (a.sizes() == b.sizes() ? (a - b).abs().max().item<double>() : -1.0);
}

}  // namespace mixtral
