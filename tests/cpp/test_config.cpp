#include <algorithm>

#include "checkpoint/config_reader.h"
#include "checkpoint_files.h"
#include "model/config.h"

namespace mixtral {
namespace {

using testing::expect_load_error;
using testing::TempFolder;
using testing::write_file;

// JSON text of an object, from (key, value) texts; an override replaces a value, and "-" removes the key.
using Keys = std::vector<std::pair<std::string, std::string>>;

std::string json_text(Keys keys, const Keys& overrides) {
  for (const auto& [key, value] : overrides) {
    const auto same = [&key = key](const auto& pair) { return pair.first == key; };
    keys.erase(std::remove_if(keys.begin(), keys.end(), same), keys.end());
    if (value != "-") keys.emplace_back(key, value);
  }
  std::string text;
  for (const auto& [key, value] : keys) text += (text.empty() ? "{\"" : ",\"") + key + "\":" + value;
  return text + "}";
}

const Keys kMixtral8x7B = {{"architectures", "[\"MixtralForCausalLM\"]"},
                           {"model_type", "\"mixtral\""},
                           {"hidden_act", "\"silu\""},
                           {"hidden_size", "4096"},
                           {"intermediate_size", "14336"},
                           {"num_hidden_layers", "32"},
                           {"num_attention_heads", "32"},
                           {"num_key_value_heads", "8"},
                           {"vocab_size", "32000"},
                           {"max_position_embeddings", "32768"},
                           {"num_local_experts", "8"},
                           {"num_experts_per_tok", "2"},
                           {"rms_norm_eps", "1e-05"},
                           {"rope_theta", "1000000.0"},
                           {"sliding_window", "null"},
                           {"tie_word_embeddings", "false"},
                           {"bos_token_id", "1"},
                           {"eos_token_id", "2"},
                           {"torch_dtype", "\"bfloat16\""}};

const Keys kParams7B = {{"dim", "4096"},         {"n_layers", "32"},      {"head_dim", "128"},
                        {"hidden_dim", "14336"}, {"n_heads", "32"},       {"n_kv_heads", "8"},
                        {"norm_eps", "1e-05"},   {"vocab_size", "32000"}, {"sliding_window", "4096"}};

Config mixtral(const Keys& overrides = {}) {
  return parse_config(json_text(kMixtral8x7B, overrides), CheckpointLayout::kHuggingFace, "dir/config.json");
}

Config params(const Keys& overrides = {}) {
  return parse_config(json_text(kParams7B, overrides), CheckpointLayout::kConsolidated, "dir/params.json");
}

TEST(Config, CountsParametersOfThePublishedModels) {
  EXPECT_EQ(mixtral().total_parameters(), 46'702'792'704);
  EXPECT_EQ(mixtral().active_parameters(), 12'879'925'248);
  EXPECT_EQ(mixtral().kv_bytes_per_token(2), 131'072);
  const Keys big = {{"hidden_size", "6144"},
                    {"intermediate_size", "16384"},
                    {"num_hidden_layers", "56"},
                    {"num_attention_heads", "48"}};
  EXPECT_EQ(mixtral(big).total_parameters(), 140'620'634'112);
  EXPECT_EQ(mixtral(big).kv_bytes_per_token(2), 229'376);
  Keys instruct = big;
  instruct.emplace_back("vocab_size", "32768");
  EXPECT_EQ(mixtral(instruct).total_parameters(), 140'630'071'296);
  const Keys dense = {{"model_type", "\"mistral\""}};
  EXPECT_EQ(mixtral(dense).total_parameters(), 7'241'732'096);
  EXPECT_EQ(mixtral(dense).active_parameters(), 7'241'732'096);
  EXPECT_EQ(params().total_parameters(), 7'241'732'096);
  EXPECT_EQ(params({{"vocab_size", "32768"}}).total_parameters(), 7'248'023'552);
  EXPECT_EQ(mixtral({{"tie_word_embeddings", "true"}}).total_parameters(), 46'702'792'704 - 32000 * 4096);
}

TEST(Config, ReadsBothTransformersSpellings) {
  const Config v4 = mixtral();
  const Config v5 = mixtral({{"rope_theta", "-"},
                             {"torch_dtype", "-"},
                             {"dtype", "\"bfloat16\""},
                             {"head_dim", "null"},
                             {"rope_parameters", R"({"rope_theta":1000000.0,"rope_type":"default"})"}});
  for (const Config& config : {v4, v5}) {
    EXPECT_EQ(config.rope_theta, 1e6);
    EXPECT_EQ(config.dtype, "bfloat16");
    EXPECT_EQ(config.head_dim, 128);
    EXPECT_EQ(config.top_k, 2);
    EXPECT_EQ(config.eos_token_ids, std::vector<int64_t>{2});
    EXPECT_TRUE(config.renormalize && config.router_in_f32);
    EXPECT_EQ(config.layout, CheckpointLayout::kHuggingFace);
  }
  EXPECT_EQ(mixtral({{"head_dim", "64"}}).head_dim, 64);
  EXPECT_EQ(mixtral({{"eos_token_id", "[2,32,7]"}}).eos_token_ids, (std::vector<int64_t>{2, 32, 7}));
}

TEST(Config, ReadsSwitchRouter) {
  const Config config =
      mixtral({{"norm_topk_prob", "false"}, {"num_experts_per_tok", "1"}, {"router_dtype", "\"model\""}});
  EXPECT_FALSE(config.renormalize);
  EXPECT_FALSE(config.router_in_f32);
  EXPECT_EQ(config.top_k, 1);
}

TEST(Config, SaysWhereTheWindowCameFrom) {
  EXPECT_EQ(mixtral().window, 0);
  EXPECT_EQ(mixtral().window_source, "config.json: sliding_window null");
  EXPECT_EQ(mixtral({{"sliding_window", "-"}}).window_source, "config.json: no sliding_window");
  for (const char* value : {"4096", "\"4096\"", "[4096]", "[4096,4096]"}) {
    EXPECT_EQ(mixtral({{"sliding_window", value}}).window, 4096) << value;
    EXPECT_EQ(mixtral({{"sliding_window", value}}).window_source, "config.json: sliding_window");
  }
  EXPECT_EQ(mixtral({{"sliding_window", "[null,null]"}}).window, 0);
  EXPECT_EQ(params({{"sliding_window", "-"}, {"_sliding_window", "64"}}).window_source, "params.json: _sliding_window");
  for (const char* value :
       {"0", "-1", "\"\"", "\"4k\"", "1.5", "true", "{}", "[]", "[1,2]", "[null,4096]", "2147483648", "1e3"}) {
    expect_load_error([&] { mixtral({{"sliding_window", value}}); }, "config.json: sliding_window: must be");
  }
}

TEST(Config, ParamsRopeThetaFollowsTheWindow) {
  EXPECT_EQ(params().rope_theta, 1e4);
  EXPECT_EQ(params({{"sliding_window", "null"}}).rope_theta, 1e6);
  EXPECT_EQ(params({{"sliding_window", "-"}}).rope_theta, 1e6);
  EXPECT_EQ(params({{"rope_theta", "5e5"}}).rope_theta, 5e5);
}

TEST(Config, ReadsParamsOfBothReleases) {
  const Config moe = params(
      {{"moe", R"({"num_experts":8,"num_experts_per_tok":2})"}, {"sliding_window", "-"}, {"max_seq_len", "65536"}});
  EXPECT_EQ(moe.total_parameters(), 46'702'792'704);
  EXPECT_EQ(moe.max_position, 65536);
  EXPECT_EQ(moe.layout, CheckpointLayout::kConsolidated);
  const std::string first =
      R"({"hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,"num_attention_heads":32,)"
      R"("num_key_value_heads":8,"vocab_size":32000,"rms_norm_eps":1e-05,"rope_theta":1e6,)"
      R"("num_local_experts":8,"num_experts_per_tok":2})";
  EXPECT_EQ(parse_config(first, CheckpointLayout::kConsolidated, "params.json").total_parameters(), 46'702'792'704);
  EXPECT_EQ(params({{"moe", "null"}}).num_experts, 0);
}

TEST(Config, MissingKeysAreErrors) {
  for (const char* key : {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "num_key_value_heads", "vocab_size", "max_position_embeddings", "num_local_experts",
                          "num_experts_per_tok", "rms_norm_eps", "rope_theta"}) {
    expect_load_error([&] { mixtral({{key, "-"}}); }, std::string("dir/config.json: ") + key + ": is missing");
  }
  expect_load_error(
      [] {
        mixtral({{"model_type", "\"mistral\""}, {"sliding_window", "-"}});
      },
      "sliding_window: is missing");
  for (const char* key : {"dim", "n_layers", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size"}) {
    expect_load_error([&] { params({{key, "-"}}); }, std::string("dir/params.json: ") + key + ": is missing");
  }
}

TEST(Config, RejectsValuesOfTheWrongKindOrRange) {
  for (const char* key :
       {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "num_local_experts", "num_experts_per_tok"}) {
    for (const char* value :
         {"\"8\"", "null", "0", "-1", "1.5", "2147483648", "9223372036854775808", "[8]", "true", "8.0"}) {
      expect_load_error([&] { mixtral({{key, value}}); }, std::string("config.json: ") + key + ": must");
    }
  }
  for (const char* value : {"\"8\"", "0", "-1", "1.5", "2147483648", "9223372036854775808", "127"}) {
    expect_load_error([&] { mixtral({{"head_dim", value}}); }, "config.json: head_dim: must");
  }
  for (const char* key : {"rms_norm_eps", "rope_theta"}) {
    for (const char* value : {"\"1\"", "null", "0", "-1", "true"}) {
      expect_load_error([&] { mixtral({{key, value}}); }, std::string("config.json: ") + key + ": must");
    }
  }
  expect_load_error([] { mixtral({{"rope_theta", "1e309"}}); }, "number out of range");
  expect_load_error([] { mixtral({{"rope_theta", "NaN"}}); }, "is not valid JSON");
  expect_load_error([] { params({{"dim", "0"}}); }, "params.json: dim: must be in [1, 131072], got 0");
}

TEST(Config, RejectsFieldsThatDoNotFitEachOther) {
  expect_load_error([] { mixtral({{"num_key_value_heads", "5"}}); }, "num_attention_heads: must be a multiple of 5");
  expect_load_error(
      [] {
        mixtral({{"num_experts_per_tok", "9"}});
      },
      "num_experts_per_tok: must be at most 8 experts, got 9");
  expect_load_error([] { mixtral({{"bos_token_id", "-1"}}); }, "bos_token_id: must be a token id");
  expect_load_error(
      [] {
        mixtral({{"rope_parameters", R"({"rope_theta":1e4,"rope_type":"default"})"}});
      },
      "rope_theta: must agree");
}

TEST(Config, RejectsWhatTheModelCannotCompute) {
  expect_load_error(
      [] {
        mixtral({{"model_type", "\"llama\""}});
      },
      "model_type: must be \"mixtral\" or \"mistral\", got \"llama\"");
  expect_load_error([] { mixtral({{"hidden_act", "\"gelu\""}}); }, "hidden_act: must be \"silu\"");
  expect_load_error(
      [] {
        mixtral({{"rope_scaling", R"({"type":"yarn","factor":4})"}});
      },
      "rope_scaling: must have rope_type \"default\", got \"yarn\"");
  expect_load_error(
      [] {
        mixtral({{"rope_parameters", R"({"rope_type":"linear","rope_theta":1e6})"}});
      },
      "got \"linear\"");
  expect_load_error(
      [] {
        mixtral({{"quantization_config", R"({"bits":4})"}});
      },
      "quantization_config: a quantisation without a name is not supported: take the checkpoint that is not quantised");
  expect_load_error(
      [] {
        mixtral({{"torch_dtype", "\"float8\""}});
      },
      "torch_dtype: must be float32, bfloat16 or float16");
  expect_load_error([] { params({{"vision_encoder", "{}"}}); }, "vision_encoder: is not supported");
  EXPECT_NO_THROW(mixtral({{"rope_scaling", "null"}, {"attention_bias", "false"}}));
}

TEST(Config, LeavesOutAnEndOfSequenceThatTheVocabularyDoesNotHave) {
  std::vector<std::string> said;
  const auto warn = [&](const std::string& message) { said.push_back(message); };
  const std::string text = json_text(kMixtral8x7B, {{"eos_token_id", "[2,32000,-1]"}});
  const Config config = parse_config(text, CheckpointLayout::kHuggingFace, "c", warn);
  EXPECT_EQ(config.eos_token_ids, std::vector<int64_t>{2});
  ASSERT_EQ(said.size(), 2u);
  EXPECT_EQ(said[0], "c: eos_token_id: 32000 is not in the vocabulary of 32000 and is left out");
}

TEST(Config, ReadsTheQuantisationsThatItWritesAndWrote) {
  for (const char* name : {"format", "quant_method"}) {
    const std::string value = std::string("{\"") + name + R"(":"mixtral","dtype":"int4"})";
    EXPECT_EQ(mixtral({{"quantization_config", value}}).quantization, "int4");
  }
  expect_load_error(
      [] {
        mixtral({{"quantization_config", R"({"format":"mixtral","dtype":"int3"})"}});
      },
      "quantization_config: must have dtype \"int8\", \"fp8\", \"int4\" or that of a float, got ");
}

TEST(Config, ChoosesTheLayoutWhoseWeightsAreThere) {
  const TempFolder folder;
  expect_load_error([&] { read_config(folder.path()); }, "holds neither config.json nor params.json");
  expect_load_error([&] { read_config(folder / "absent"); }, "is not a folder");
  write_file(folder / "params.json", json_text(kParams7B, {}));
  EXPECT_EQ(read_config(folder.path()).layout, CheckpointLayout::kConsolidated);
  write_file(folder / "config.json", json_text(kMixtral8x7B, {}));
  EXPECT_EQ(read_config(folder.path()).layout, CheckpointLayout::kHuggingFace);
  write_file(folder / "consolidated.safetensors", "");
  EXPECT_EQ(read_config(folder.path()).layout, CheckpointLayout::kConsolidated);
  write_file(folder / "model.safetensors.index.json", "");
  EXPECT_EQ(read_config(folder.path()).layout, CheckpointLayout::kHuggingFace);
}

TEST(Config, SurvivesEveryTruncationAndBitFlip) {
  const auto load = [](const std::string& text, CheckpointLayout layout) {
    try {
      parse_config(text, layout, "file");
    } catch (const LoadError&) {
    }
  };
  for (const auto layout : {CheckpointLayout::kHuggingFace, CheckpointLayout::kConsolidated}) {
    const std::string valid = json_text(layout == CheckpointLayout::kHuggingFace ? kMixtral8x7B : kParams7B, {});
    for (size_t n = 0; n < valid.size(); ++n) load(valid.substr(0, n), layout);
    for (size_t i = 0; i < 8 * valid.size(); ++i) {
      std::string flipped = valid;
      flipped[i / 8] = static_cast<char>(flipped[i / 8] ^ 1 << i % 8);
      load(flipped, layout);
    }
  }
}

}  // namespace
}  // namespace mixtral
