// Which weights are packed, what errors say, and the config.json that a quantised checkpoint gets.
#include <gtest/gtest.h>

#include "checkpoint/config_reader.h"
#include "checkpoint/save.h"
#include "checkpoint_files.h"
#include "model/packing.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

std::string error_of(const std::string& name, const Config& config, const std::string& device) {
  try {
    parse_weight_type(name, config, device);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(Packing, FloatWeightsArePackedOnTheCpuWhereSizesAllow) {
  const Config config = packable_config();
  EXPECT_EQ(parse_weight_type("auto", config, "cpu").packing, Packing::kFloat);
  EXPECT_EQ(parse_weight_type("float32", config, "cpu", /*pack=*/false).packing, Packing::kNone);
  EXPECT_EQ(parse_weight_type("float32", config, "cuda").packing, Packing::kNone);
  for (int64_t Config::*size : {&Config::hidden_size, &Config::intermediate_size, &Config::head_dim}) {
    Config unfit = config;
    unfit.*size = 36;
    EXPECT_EQ(parse_weight_type("float32", unfit, "cpu").packing, Packing::kNone);
  }
}

TEST(Packing, NamesAreThoseOfTheWeights) {
  for (const std::string name : {"float32", "bfloat16", "float16", "int8", "fp8", "int4"})
    for (const char* device : {"cpu", "cuda"})
      EXPECT_EQ(parse_weight_type(name, packable_config(), device).name(), name);
}

TEST(Packing, ErrorsSayWhatDoesNotFit) {
  const Config config = packable_config();
  EXPECT_EQ(error_of("int3", config, "cpu"),
            "dtype must be auto, float32, bfloat16, float16, int8, fp8 or int4, got int3");
  Config unfit = config;
  unfit.num_kv_heads = 1;
  EXPECT_EQ(error_of("fp8", unfit, "cpu"),
            "dtype fp8 needs sizes that are multiples of 32, got num_kv_heads * head_dim 16");
  EXPECT_EQ(error_of("int8", unfit, "cpu"),
            "dtype int8 needs sizes that are multiples of 32, got num_kv_heads * head_dim 16");
  Config quantized = config;
  quantized.quantization = "int8";
  EXPECT_EQ(error_of("auto", quantized, "cpu"), "");
  EXPECT_EQ(error_of("int4", quantized, "cpu"),
            "dtype must be auto or int8 for a checkpoint quantised to int8, got int4");
}

TEST(Packing, EveryRankNeedsWholeBlocks) {
  const Config config = packable_config();  // 2 key/value heads of 16
  const Placement first = Placement::of_rank(0, 2, 1, true);
  EXPECT_EQ(unfit_size(config), "");
  EXPECT_EQ(unfit_size(config, first), "num_kv_heads * head_dim 32 over 2 ranks");
  EXPECT_EQ(parse_weight_type("float32", config, "cpu", true, first).packing, Packing::kNone);
  try {
    parse_weight_type("int4", config, "cpu", true, first);
    ADD_FAILURE();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "dtype int4 needs sizes that are multiples of 32, got num_kv_heads * head_dim 32 over 2 ranks");
  }
  EXPECT_THROW(ParameterAllocator(config, torch::kFloat32, torch::kMeta, Packing::kFloat, first),
               std::invalid_argument);
  Config wider = config;
  wider.head_dim = 32;
  EXPECT_EQ(unfit_size(wider, first), "");  // experts are whole
  const Placement cut = Placement::of_rank(0, 2, 1, false);
  EXPECT_EQ(unfit_size(wider, cut), "intermediate_size 96 over 2 ranks");
  EXPECT_EQ(unfit_size(wider, Placement::of_rank(0, 4, 1, true)), "hidden_size 64 over 4 ranks");
}

TEST(Packing, AllocatesWhatTheRankHolds) {
  Config config = packable_config();
  config.head_dim = 32;
  const Placement last = Placement::of_rank(1, 2, 2, true);  // the second rank of the last stage
  const ParameterAllocator allocator(config, torch::kBFloat16, torch::kCPU, Packing::kInt8, last);
  torch::nn::Module module;
  const auto shape = [&](const std::string& path, const std::string& name) {
    return allocator.add(module, path, name).sizes().vec();
  };
  EXPECT_EQ(shape("layers.1.attention.", "qkv_proj"), (std::vector<int64_t>{1, 4, 32 * 64 + 128}));  // 2 + 1 + 1 heads
  EXPECT_EQ(shape("layers.1.attention.", "o_proj"), (std::vector<int64_t>{1, 1, 32 * 128 + 128}));
  EXPECT_EQ(shape("layers.1.moe.", "down_proj"), (std::vector<int64_t>{2, 2, 32 * 96 + 128}));  // 2 of 4 experts
  EXPECT_EQ(shape("layers.1.moe.", "router"), (std::vector<int64_t>{4, 64}));
  EXPECT_EQ(shape("", "lm_head"), (std::vector<int64_t>{1, 2, 32 * 64 + 128}));
  EXPECT_THROW(shape("layers.0.attention.", "qkv_proj"), std::out_of_range);
  EXPECT_THROW(shape("", "embed_tokens"), std::out_of_range);
}

TEST(Packing, PlannedBytesAreThoseOfTheParameters) {
  Config config = packable_config(8);
  config.hidden_size = 512;
  config.intermediate_size = 1024;
  for (const int64_t vocab : {4096, 4097})  // with a packed lm_head and a plain one
    for (const bool tied : {false, true})
      for (const Packing packing : {Packing::kNone, Packing::kFloat, Packing::kInt8, Packing::kFp8, Packing::kInt4}) {
        config.vocab_size = vocab;
        config.tie_word_embeddings = tied;
        const MixtralImpl model(config, torch::kBFloat16, torch::kMeta, packing);
        double bytes = 0;
        for (const torch::Tensor& parameter : model.parameters()) bytes += static_cast<double>(parameter.nbytes());
        EXPECT_NEAR(weight_bytes(config, model.weight_type()) / bytes, 1, 0.01) << model.weight_type().name() << vocab;
      }
}

TEST(Save, ConfigJsonGivesTheConfigBack) {
  Config config = packable_config(8, 3, 0);
  config.head_dim = 48;  // not hidden_size / num_heads
  config.rms_norm_eps = 1.0 / 3;
  config.rope_theta = 123456.75;
  config.dtype = "float16";
  config.bos_token_id = 5;
  config.eos_token_ids = {7, 0};
  config.quantization = "int4";
  config.select_bias = true;
  Config dense = packable_config(0, 0, 77);
  dense.renormalize = dense.router_in_f32 = false;
  dense.tie_word_embeddings = true;
  dense.eos_token_ids = {};
  for (const Config& c : {config, dense}) {
    const auto back = parse_config(config_json(c), CheckpointLayout::kHuggingFace, "config.json");
    const auto fields = [](const Config& x) {
      return std::tuple(x.hidden_size, x.intermediate_size, x.num_layers, x.num_heads, x.num_kv_heads, x.head_dim,
                        x.vocab_size, x.max_position, x.num_experts, x.top_k, x.renormalize, x.router_in_f32,
                        x.select_bias, x.rms_norm_eps, x.rope_theta, x.window, x.tie_word_embeddings, x.dtype,
                        x.quantization, x.bos_token_id, x.eos_token_ids);
    };
    EXPECT_EQ(fields(back), fields(c)) << config_json(c);
    Config plain = c;
    plain.quantization.clear();
    EXPECT_EQ(fields(parse_config(params_json(c), CheckpointLayout::kConsolidated, "params.json")), fields(plain));
  }
}

TEST(Save, OnlyQuantisedModels) {
  const testing::TempFolder folder;
  EXPECT_THROW(save_packed(*tiny_model(packable_config()), folder.path(), folder / "out"), std::invalid_argument);
  EXPECT_FALSE(std::filesystem::exists(folder / "out"));
}

}  // namespace
}  // namespace mixtral
