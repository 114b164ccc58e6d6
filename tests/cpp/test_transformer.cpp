// The model against an independent float64 forward pass in plain torch, and against itself: whatever the chunking,
// batch, cache or thread count, a token's bits are the same.
#include <ATen/Parallel.h>

#include <set>

#include "model/ops.h"
#include "model/transformer.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

// ---- oracle

torch::Tensor oracle_norm(const torch::Tensor& x, const torch::Tensor& weight, double eps) {
  return x * torch::rsqrt(x.pow(2).mean(-1, true) + eps) * weight;
}

torch::Tensor oracle_rope(const torch::Tensor& x, double theta) {  // [T,N,D]
  const int64_t half = x.size(2) / 2;
  const auto frequency = torch::pow(theta, -torch::arange(half, torch::kFloat64) / half);
  const auto angle = torch::outer(torch::arange(x.size(0), torch::kFloat64), frequency).unsqueeze(1);  // [T,1,D/2]
  const auto a = x.narrow(2, 0, half), b = x.narrow(2, half, half);
  return torch::cat({a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()}, 2);
}

torch::Tensor oracle_attention(const Config& config, const torch::Tensor& qkv) {  // [T,(Nq+2Nkv)*D] -> [T,Nq*D]
  const int64_t tokens = qkv.size(0), group = config.num_heads / config.num_kv_heads;
  const auto heads = qkv.view({tokens, -1, config.head_dim})
                         .split_with_sizes({config.num_heads, config.num_kv_heads, config.num_kv_heads}, 1);
  const auto q = oracle_rope(heads[0], config.rope_theta);
  const auto k = oracle_rope(heads[1], config.rope_theta).repeat_interleave(group, 1);
  const auto v = heads[2].repeat_interleave(group, 1);
  const auto position = torch::arange(tokens);
  const auto distance = position.unsqueeze(1) - position.unsqueeze(0);
  auto hidden = distance < 0;
  if (config.window > 0) hidden = hidden | (distance >= config.window);
  const auto scores = torch::einsum("qnd,knd->nqk", {q, k}) / std::sqrt(static_cast<double>(config.head_dim));
  const auto weights = scores.masked_fill(hidden, -INFINITY).softmax(-1);
  return torch::einsum("nqk,knd->qnd", {weights, v}).flatten(1);
}

torch::Tensor oracle_expert(const torch::Tensor& x, const torch::Tensor& gate_up, const torch::Tensor& down) {
  const auto parts = x.matmul(gate_up.t()).chunk(2, -1);
  return (torch::silu(parts[0]) * parts[1]).matmul(down.t());
}

torch::Tensor oracle_logits(Mixtral& model, const std::vector<int64_t>& ids) {  // -> [T,vocab] f64
  const Config& config = model->config();
  const auto parameters = model->named_parameters();
  const auto get = [&](const std::string& name) { return parameters[name].to(torch::kFloat64); };
  auto x = get("embed_tokens").index_select(0, torch::tensor(ids, torch::kInt64));
  for (int64_t n = 0; n < config.num_layers; ++n) {
    const std::string layer = "layers." + std::to_string(n) + ".";
    auto normed = oracle_norm(x, get(layer + "input_layernorm"), config.rms_norm_eps);
    const auto qkv = normed.matmul(get(layer + "attention.qkv_proj").t());
    x = x + oracle_attention(config, qkv).matmul(get(layer + "attention.o_proj").t());
    normed = oracle_norm(x, get(layer + "post_attention_layernorm"), config.rms_norm_eps);
    if (!config.is_moe()) {
      x = x + oracle_expert(normed, get(layer + "mlp.gate_up_proj")[0], get(layer + "mlp.down_proj")[0]);
      continue;
    }
    auto [weights, experts] = normed.matmul(get(layer + "moe.router").t()).softmax(-1).topk(config.top_k, -1);
    if (config.renormalize) weights = weights / weights.sum(-1, true);
    const auto gate_up = get(layer + "moe.gate_up_proj"), down = get(layer + "moe.down_proj");
    auto sum = torch::zeros_like(x);
    for (int64_t e = 0; e < config.num_experts; ++e)
      sum += (weights * (experts == e)).sum(-1, true) * oracle_expert(normed, gate_up[e], down[e]);
    x = x + sum;
  }
  return oracle_norm(x, get("norm"), config.rms_norm_eps)
      .matmul(get(config.tie_word_embeddings ? "embed_tokens" : "lm_head").t());
}

TEST(Transformer, MatchesAFloat64ForwardPass) {
  Config switch_router = tiny_config(8, 1, 0);
  switch_router.renormalize = false;
  Config tied = tiny_config(1, 1, 3);
  tied.tie_word_embeddings = true;
  for (const Config& config : {tiny_config(4, 2, 8), tiny_config(8, 2, 0), tiny_config(0, 0, 5), switch_router, tied}) {
    auto model = tiny_model(config);
    const auto ids = random_ids(40, config.vocab_size, 3);
    const auto logits = model->forward(torch::tensor(ids, torch::kInt64).unsqueeze(0))[0];
    EXPECT_EQ(logits.scalar_type(), torch::kFloat32);
    const auto error = (logits - oracle_logits(model, ids)).abs().max().item<double>();
    EXPECT_LT(error, 1e-4) << "experts " << config.num_experts << ", window " << config.window;
  }
}

// ---- invariants
// ------------------------------------------------------------------------------------------------------

struct Case {
  int64_t num_experts, top_k, window;
  torch::ScalarType dtype;
  Packing packing = Packing::kNone;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16})
    for (const int64_t window : {0, 8})
      for (const auto& [experts, top_k] : std::vector<std::pair<int64_t, int64_t>>{{0, 0}, {1, 1}, {4, 1}, {8, 2}})
        all.push_back({experts, top_k, window, dtype});
  const std::vector<std::pair<torch::ScalarType, Packing>> packed = {{torch::kFloat32, Packing::kFloat},
                                                                     {torch::kBFloat16, Packing::kFloat},
                                                                     {torch::kBFloat16, Packing::kInt8},
                                                                     {torch::kBFloat16, Packing::kFp8},
                                                                     {torch::kBFloat16, Packing::kInt4}};
  for (const auto& [dtype, packing] : packed) {
    all.push_back({0, 0, 8, dtype, packing});
    all.push_back({8, 2, 0, dtype, packing});
  }
  return all;
}

Mixtral model_of(const Case& c) {
  if (c.packing == Packing::kNone) return tiny_model(tiny_config(c.num_experts, c.top_k, c.window), c.dtype);
  return packed_model(tiny_model(packable_config(c.num_experts, c.top_k, c.window), c.dtype), c.packing);
}

class Invariance : public ::testing::TestWithParam<Case> {
 protected:
  Invariance() : model(model_of(GetParam())), ids(random_ids(43, 101, 7)) {}
  Mixtral model;
  std::vector<int64_t> ids;
};
const char* const kPackingNames[] = {"", "Packed", "Int8", "Fp8", "Int4"};
INSTANTIATE_TEST_SUITE_P(Transformer, Invariance, ::testing::ValuesIn(cases()), [](const auto& info) {
  const Case& c = info.param;
  return "E" + std::to_string(c.num_experts) + "K" + std::to_string(c.top_k) + "W" + std::to_string(c.window) +
         torch::toString(c.dtype) + kPackingNames[static_cast<size_t>(c.packing)];
});

TEST_P(Invariance, ChunkedThroughTheRollingCacheEqualsWholeWithoutOne) {
  const auto expected = whole(model, ids);
  for (const int64_t chunk : {1, 3, 7, 8, 9, 43})  // 1, 3, W-1, W, W+1, all
    for (const int64_t page_size : {1, 4, 16})
      EXPECT_TRUE(same_bits(chunked(model, ids, chunk, page_size), expected)) << chunk << ", pages of " << page_size;
}

TEST_P(Invariance, BatchEqualsAlone) {
  const std::vector<std::vector<int64_t>> prompts = {random_ids(17, 101, 1), ids, random_ids(1, 101, 2)};
  const auto packed = model->hidden_states(packed_batch(prompts, torch::kCPU)).split_with_sizes({17, 43, 1});
  for (size_t i = 0; i < prompts.size(); ++i) EXPECT_TRUE(same_bits(packed[i], whole(model, prompts[i]))) << i;

  // The same through one cache: first chunks of all, then a decode step of one beside a chunk of another.
  RollingKVCache cache(model->config(), {4, 40, 64, torch::kCPU, model->dtype()});
  const int64_t a = cache.add_sequence(), b = cache.add_sequence();
  const auto part = [](const std::vector<int64_t>& v, int64_t from, int64_t to) {
    return std::vector<int64_t>(v.begin() + from, v.begin() + to);
  };
  const auto first = model->hidden_states(cache.prepare({{a, part(ids, 0, 30)}, {b, part(prompts[0], 0, 16)}}), &cache);
  const auto second =
      model->hidden_states(cache.prepare({{b, part(prompts[0], 16, 17)}, {a, part(ids, 30, 43)}}), &cache);
  EXPECT_TRUE(same_bits(torch::cat({first.narrow(0, 0, 30), second.narrow(0, 1, 13)}), whole(model, ids)));
  EXPECT_TRUE(same_bits(torch::cat({first.narrow(0, 30, 16), second.narrow(0, 0, 1)}), whole(model, prompts[0])));
}

TEST_P(Invariance, OneThreadEqualsTwo) {
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const auto one = model->logits(whole(model, ids));
  at::set_num_threads(2);
  EXPECT_TRUE(same_bits(model->logits(whole(model, ids)), one));
  at::set_num_threads(threads);
}

TEST_P(Invariance, LogitsOfOneRowEqualThoseOfAll) {
  const auto hidden = whole(model, ids), all = model->logits(hidden);
  for (const int64_t row : {0, 20, 42})
    EXPECT_TRUE(same_bits(model->logits(hidden.narrow(0, row, 1)), all.narrow(0, row, 1)));
}

// Whoever needs Mixtral's own sizes: stock CPU matrix products lose batch invariance only there.
TEST(Transformer, OneLayerOfMixtral8x7BIsBatchInvariant) {
  Config config = tiny_config(8, 2, 0);
  config.hidden_size = 4096;
  config.intermediate_size = 14336;
  config.num_layers = 1;
  config.num_heads = 32;
  config.num_kv_heads = 8;
  config.head_dim = 128;
  Mixtral model(config, torch::kBFloat16, torch::kCPU);
  model->init_random(1);
  const auto ids = random_ids(33, config.vocab_size, 5);
  const auto expected = model->logits(whole(model, ids));
  for (const int64_t tokens : {1, 16}) {
    const auto prefix = whole(model, {ids.begin(), ids.begin() + tokens});
    EXPECT_TRUE(same_bits(model->logits(prefix), expected.narrow(0, 0, tokens))) << tokens;
  }
}

TEST(Transformer, PackingDoesNotChangeABit) {
  for (const auto dtype : {torch::kFloat32, torch::kBFloat16, torch::kFloat16})
    for (const int64_t experts : {0, 4}) {
      auto plain = tiny_model(packable_config(experts), dtype);
      auto packed = packed_model(plain, Packing::kFloat);
      const auto ids = random_ids(43, 101, 7);
      EXPECT_TRUE(same_bits(packed->logits(whole(packed, ids)), plain->logits(whole(plain, ids)))) << dtype;
    }
}

// ---- interface
// -------------------------------------------------------------------------------------------------------

TEST(Transformer, ParameterNamesAndShapes) {
  const auto names = [](const Config& config) {
    std::set<std::string> out;
    for (const auto& item : tiny_model(config)->named_parameters()) {
      EXPECT_FALSE(item.value().requires_grad());
      out.insert(item.key() + " " + c10::str(item.value().sizes()));
    }
    return out;
  };
  Config config = tiny_config();
  config.num_layers = 1;
  const std::set<std::string> shared = {"embed_tokens [101, 48]",
                                        "norm [48]",
                                        "layers.0.input_layernorm [48]",
                                        "layers.0.post_attention_layernorm [48]",
                                        "layers.0.attention.qkv_proj [96, 48]",
                                        "layers.0.attention.o_proj [48, 48]"};
  auto moe = shared;
  moe.insert({"lm_head [101, 48]", "layers.0.moe.router [4, 48]", "layers.0.moe.gate_up_proj [4, 112, 48]",
              "layers.0.moe.down_proj [4, 48, 56]"});
  EXPECT_EQ(names(config), moe);
  auto dense_and_tied = shared;
  dense_and_tied.insert({"layers.0.mlp.gate_up_proj [1, 112, 48]", "layers.0.mlp.down_proj [1, 48, 56]"});
  config.num_experts = config.top_k = 0;
  config.tie_word_embeddings = true;
  EXPECT_EQ(names(config), dense_and_tied);
}

TEST(Transformer, RouterIsF32UnlessToldOtherwise) {
  Config config = tiny_config();
  EXPECT_EQ(tiny_model(config, torch::kBFloat16)->named_parameters()["layers.0.moe.router"].scalar_type(),
            torch::kFloat32);
  config.router_in_f32 = false;
  auto model = tiny_model(config, torch::kBFloat16);
  EXPECT_EQ(model->named_parameters()["layers.0.moe.router"].scalar_type(), torch::kBFloat16);
  EXPECT_TRUE(torch::isfinite(whole(model, {1, 2, 3})).all().item<bool>());
}

TEST(Transformer, InitRandomDependsOnTheSeedAlone) {
  auto model = tiny_model(tiny_config(), torch::kFloat32, 1);
  const auto weight = model->named_parameters()["lm_head"].clone();
  EXPECT_NEAR(weight.std().item<double>(), 0.2, 0.01);
  EXPECT_TRUE(torch::equal(tiny_model(tiny_config(), torch::kFloat32, 1)->named_parameters()["lm_head"], weight));
  EXPECT_FALSE(torch::equal(tiny_model(tiny_config(), torch::kFloat32, 2)->named_parameters()["lm_head"], weight));
}

TEST(Transformer, ForwardTakesBatchesAndRejectsWhatIsNotOne) {
  auto model = tiny_model(tiny_config());
  const auto input = torch::tensor(random_ids(10, 101, 1), torch::kInt64).view({2, 5});
  const auto logits = model->forward(input);
  EXPECT_EQ(logits.sizes(), (std::vector<int64_t>{2, 5, 101}));
  EXPECT_FALSE(logits.requires_grad());
  EXPECT_TRUE(same_bits(model->forward(input.narrow(0, 1, 1))[0], logits[1]));
  EXPECT_EQ(model->forward(input.narrow(1, 0, 0)).sizes(), (std::vector<int64_t>{2, 0, 101}));
  EXPECT_EQ(model->forward(input.narrow(0, 0, 0)).sizes(), (std::vector<int64_t>{0, 5, 101}));

  const auto message = [&](const torch::Tensor& ids) -> std::string {
    try {
      model->forward(ids);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message(torch::tensor({{1, 101}}, torch::kInt64)),
            "Mixtral: token ids must be in [0, 101), got 101 at index 1");
  EXPECT_EQ(message(torch::tensor({{-1}}, torch::kInt64)), "Mixtral: token ids must be in [0, 101), got -1 at index 0");
  EXPECT_EQ(message(torch::tensor({1}, torch::kInt64)), "Mixtral: input_ids must be int64 [B, S], got Long [1]");
  EXPECT_EQ(message(torch::tensor({{1}}, torch::kInt32)), "Mixtral: input_ids must be int64 [B, S], got Int [1, 1]");
}

}  // namespace
}  // namespace mixtral
