#include <algorithm>
#include <cmath>
#include <limits>

#include "checkpoint/weights.h"
#include "checkpoint_files.h"
#include "checkpoint_tensors.h"
#include "model/parameters.h"
#include "model/transformer.h"

namespace mixtral {
namespace {

using testing::checkpoint_config;
using testing::expect_load_error;
using testing::file_bytes;
using testing::peak_memory;
using testing::random_tensors;
using testing::safetensors;
using testing::TempFolder;
using testing::Tensors;
using testing::write_file;

using Parameters = torch::OrderedDict<std::string, torch::Tensor>;

// The parameters of model/parameters.h, filled with NaN.
Parameters empty_parameters(const Config& config, torch::ScalarType type) {
  Parameters parameters;
  for (const Parameter& parameter : model_parameters(config)) {
    parameters.insert(parameter.name, torch::full(parameter.shape, std::numeric_limits<double>::quiet_NaN(),
                                                  parameter.is_f32 ? torch::kFloat32 : type));
  }
  return parameters;
}

Parameters load(const std::filesystem::path& folder, const Config& config, torch::ScalarType type) {
  const Parameters parameters = empty_parameters(config, type);
  Checkpoint(folder, config).read_into(parameters, Packing::kNone, nullptr);
  return parameters;
}

Parameters load(const Tensors& tensors, const Config& config, torch::ScalarType type) {
  const TempFolder folder;
  const bool consolidated = config.layout == CheckpointLayout::kConsolidated;
  write_file(folder / (consolidated ? "consolidated.safetensors" : "model.safetensors"), file_bytes(tensors));
  return load(folder.path(), config, type);
}

// The rows of `t` [n*D,H], rotary pairs (i, i + D/2) of each head brought side by side: what consolidated files hold.
torch::Tensor interleaved(const torch::Tensor& t, int64_t head_dim) {
  std::vector<int64_t> rows;
  for (int64_t head = 0; head < t.size(0); head += head_dim) {
    for (int64_t i = 0; i < head_dim / 2; ++i) {
      rows.push_back(head + i);
      rows.push_back(head + i + head_dim / 2);
    }
  }
  return t.index_select(0, torch::tensor(rows)).contiguous();
}

void expect_equal(const Parameters& a, const Parameters& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& item : a) EXPECT_TRUE(torch::equal(item.value(), b[item.key()])) << item.key();
}

TEST(Checkpoint, FillsEveryRowOfEveryParameter) {
  const Config config = checkpoint_config(3);
  const Tensors t = random_tensors(config, WeightNames::kHuggingFace, torch::kBFloat16);
  const Parameters p = load(t, config, torch::kBFloat16);
  EXPECT_TRUE(torch::equal(p["embed_tokens"], t.at("model.embed_tokens.weight")));
  EXPECT_TRUE(torch::equal(p["lm_head"], t.at("lm_head.weight")));
  EXPECT_TRUE(torch::equal(p["norm"], t.at("model.norm.weight")));
  for (const std::string n : {"0", "1"}) {
    const std::string from = "model.layers." + n + ".", to = "layers." + n + ".";
    const auto at = [&](const std::string& name) { return t.at(from + name + ".weight"); };
    EXPECT_TRUE(torch::equal(p[to + "input_layernorm"], at("input_layernorm")));
    EXPECT_TRUE(torch::equal(p[to + "post_attention_layernorm"], at("post_attention_layernorm")));
    EXPECT_TRUE(torch::equal(p[to + "attention.qkv_proj"],
                             torch::cat({at("self_attn.q_proj"), at("self_attn.k_proj"), at("self_attn.v_proj")})));
    EXPECT_TRUE(torch::equal(p[to + "attention.o_proj"], at("self_attn.o_proj")));
    EXPECT_TRUE(torch::equal(p[to + "moe.router"], at("block_sparse_moe.gate").to(torch::kFloat32)));
    for (int64_t m = 0; m < 3; ++m) {
      const std::string expert = "block_sparse_moe.experts." + std::to_string(m) + ".";
      EXPECT_TRUE(torch::equal(p[to + "moe.gate_up_proj"][m], torch::cat({at(expert + "w1"), at(expert + "w3")})));
      EXPECT_TRUE(torch::equal(p[to + "moe.down_proj"][m], at(expert + "w2")));
    }
  }
}

TEST(Checkpoint, AllSpellingsGiveTheSameParameters) {
  Config config = checkpoint_config(3);
  const Tensors v4 = random_tensors(config, WeightNames::kHuggingFace, torch::kBFloat16);
  const Parameters expected = load(v4, config, torch::kBFloat16);

  Tensors merged, consolidated;
  for (const WeightSlice& slice : weight_slices(config, WeightNames::kHuggingFaceMerged)) {
    const bool same_name = v4.count(slice.tensor) > 0;
    merged[slice.tensor] = same_name ? v4.at(slice.tensor) : expected[slice.parameter].to(torch::kBFloat16);
  }
  expect_equal(load(merged, config, torch::kBFloat16), expected);

  const auto v4_slices = weight_slices(config, WeightNames::kHuggingFace);
  const auto slices = weight_slices(config, WeightNames::kConsolidated);
  ASSERT_EQ(slices.size(), v4_slices.size());
  for (size_t i = 0; i < slices.size(); ++i) {
    const torch::Tensor& t = v4.at(v4_slices[i].tensor);
    const bool rotary =
        slices[i].tensor.find(".wq.") != std::string::npos || slices[i].tensor.find(".wk.") != std::string::npos;
    consolidated[slices[i].tensor] = rotary ? interleaved(t, config.head_dim) : t;
  }
  config.layout = CheckpointLayout::kConsolidated;
  expect_equal(load(consolidated, config, torch::kBFloat16), expected);
}

TEST(Checkpoint, ReadsDenseAndTiedModels) {
  Config config = checkpoint_config(0);
  config.tie_word_embeddings = true;
  const Tensors t = random_tensors(config, WeightNames::kHuggingFace, torch::kFloat32);
  const Parameters p = load(t, config, torch::kFloat32);
  const std::string mlp = "model.layers.1.mlp.";
  EXPECT_TRUE(torch::equal(p["layers.1.mlp.gate_up_proj"][0],
                           torch::cat({t.at(mlp + "gate_proj.weight"), t.at(mlp + "up_proj.weight")})));
  EXPECT_TRUE(torch::equal(p["layers.1.mlp.down_proj"][0], t.at(mlp + "down_proj.weight")));
}

TEST(Checkpoint, ConvertsEveryDtypeRoundingToNearestEven) {
  const Config config = checkpoint_config(2);
  // Halfway between two bfloat16 values (twice), not a number, infinite.
  const std::vector<double> special = {1.00390625, 1.01171875, NAN, INFINITY, 0, -0.0, 1, 2};
  for (const auto from : {torch::kFloat32, torch::kBFloat16, torch::kHalf}) {
    for (const auto to : {torch::kFloat32, torch::kBFloat16, torch::kHalf}) {
      Tensors t = random_tensors(config, WeightNames::kHuggingFace, from);
      t["model.norm.weight"] = torch::tensor(special).to(from);
      const Parameters p = load(t, config, to);
      EXPECT_TRUE(torch::equal(p["lm_head"], t.at("lm_head.weight").to(to)));
      EXPECT_TRUE(torch::allclose(p["norm"], t.at("model.norm.weight").to(to), 0, 0, /*equal_nan=*/true));
    }
  }
}

TEST(Checkpoint, ReadsTensorsLargerThanTheStagingBuffer) {
  Config config = checkpoint_config(0);
  config.layout = CheckpointLayout::kConsolidated;
  config.num_layers = 1;
  config.head_dim = 1024;
  config.hidden_size = 4096;  // wq [4*1024,4096] bf16: 32 MiB, read in two pieces
  const Tensors t = random_tensors(config, WeightNames::kConsolidated, torch::kBFloat16);
  const TempFolder folder;
  write_file(folder / "consolidated.safetensors", file_bytes(t));
  const Checkpoint checkpoint(folder.path(), config);
  for (const auto type : {torch::kBFloat16, torch::kFloat32}) {
    const Parameters p = empty_parameters(config, type);
    std::vector<uint64_t> seen;
    checkpoint.read_into(p, Packing::kNone, [&](uint64_t done, uint64_t total) {
      EXPECT_EQ(total, checkpoint.bytes());
      seen.push_back(done);
    });
    ASSERT_FALSE(seen.empty());
    EXPECT_EQ(seen.back(), checkpoint.bytes());
    EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
    const torch::Tensor q = p["layers.0.attention.qkv_proj"].narrow(0, 0, 4096).to(torch::kBFloat16);
    EXPECT_TRUE(torch::equal(interleaved(q, 1024), t.at("layers.0.attention.wq.weight")));
    EXPECT_TRUE(
        torch::equal(p["layers.0.attention.o_proj"].to(torch::kBFloat16), t.at("layers.0.attention.wo.weight")));
  }
}

class ShardedCheckpoint : public ::testing::Test {
 protected:
  ShardedCheckpoint() : config_(checkpoint_config(2)) {
    for (const auto& [name, tensor] : random_tensors(config_, WeightNames::kHuggingFace, torch::kBFloat16)) {
      const int shard = static_cast<int>(map_.size()) % 2;
      map_[name] = "\"model-" + std::to_string(shard) + ".safetensors\"";
      shards_[shard][name] = tensor;
    }
  }

  Parameters load() {
    for (int i = 0; i < 2; ++i)
      write_file(folder_ / ("model-" + std::to_string(i) + ".safetensors"), file_bytes(shards_[i]));
    std::string index;
    for (const auto& [name, file] : map_) index += (index.empty() ? "{\"" : ",\"") + name + "\":" + file;
    write_file(folder_ / "model.safetensors.index.json",
               R"({"metadata":{"total_size":1},"weight_map":)" + index + "}}");
    return mixtral::load(folder_.path(), config_, torch::kBFloat16);
  }

  const TempFolder folder_;
  const Config config_;
  Tensors shards_[2];
  std::map<std::string, std::string> map_;
};

TEST_F(ShardedCheckpoint, GivesWhatOneFileGives) {
  expect_equal(load(), mixtral::load(random_tensors(config_, WeightNames::kHuggingFace, torch::kBFloat16), config_,
                                     torch::kBFloat16));
}

TEST_F(ShardedCheckpoint, NeverLeavesTheFolder) {
  for (const char* shard : {"\"../model-0.safetensors\"", "\"/etc/passwd\"", "\"\"", "\".\"", "\"..\"", "\"a/b\"",
                            "\"a\\\\b\"", "\"model-0.safetensors\\u0000\"", "1", "null"}) {
    map_["lm_head.weight"] = shard;
    expect_load_error([&] { load(); }, "lm_head.weight: must be in a file beside the index");
  }
  map_["lm_head.weight"] = "\"absent.safetensors\"";
  expect_load_error([&] { load(); }, "absent.safetensors: is listed, but there is no such file");
}

TEST_F(ShardedCheckpoint, NeedsEveryTensorOnce) {
  const std::string name = "model.norm.weight";
  const Parameters expected = load();
  map_["extra"] = "\"model-0.safetensors\"";
  map_.erase("lm_head.weight");
  expect_equal(load(), expected);  // an index that lists too much and too little is no matter
  const Tensors first = shards_[0], second = shards_[1];
  shards_[0][name] = shards_[1][name] = torch::ones({8}, torch::kBFloat16);
  expect_load_error([&] { load(); }, name + ": is in ");
  shards_[0] = first;
  shards_[1] = second;
  shards_[0].erase(name);
  shards_[1].erase(name);
  expect_load_error([&] { load(); }, name + ": tensor is missing");
}

TEST(Checkpoint, RejectsTensorsThatDoNotFitTheModel) {
  const Config config = checkpoint_config(2);
  const Tensors valid = random_tensors(config, WeightNames::kHuggingFace, torch::kBFloat16);
  const auto with = [&](const std::string& name, const torch::Tensor& tensor) {
    return [&, name, tensor] {
      Tensors tensors = valid;
      tensors[name] = tensor;
      load(tensors, config, torch::kBFloat16);
    };
  };
  const torch::Tensor one = torch::zeros({1}, torch::kBFloat16);
  for (const auto& [name, tensor] : valid) {
    Tensors tensors = valid;
    tensors.erase(name);
    expect_load_error([&] { load(tensors, config, torch::kBFloat16); }, name + ": tensor is missing");
    expect_load_error(with(name, one), name + ": shape must be [");
  }
  expect_load_error(with("lm_head.weight", torch::zeros({8, 11}, torch::kBFloat16)),
                    "shape must be [11, 8], got [8, 11]");
  expect_load_error(with("lm_head.weight", torch::zeros({11, 8}, torch::kInt64)),
                    "dtype must be F32, BF16 or F16, got I64");
  expect_load_error(with("model.layers.2.input_layernorm.weight", one), "is not part of the model");
  expect_load_error(with("model.layers.0.self_attn.q_proj.bias", one), "is not part of the model");
  expect_load_error(with("model.layers.0.block_sparse_moe.experts.2.w1.weight", one), "is not part of the model");
  EXPECT_NO_THROW(with("model.layers.0.self_attn.rotary_emb.inv_freq", one)());
  EXPECT_NO_THROW(with("score.weight", one)());
}

TEST(Checkpoint, NeedsWeights) {
  const TempFolder folder;
  expect_load_error([&] { Checkpoint(folder.path(), checkpoint_config(2)); }, "holds neither model.safetensors nor");
}

// In a child process, whose peak is its own. The file is sparse, so writing it costs no memory.
class CheckpointDeathTest : public ::testing::TestWithParam<Packing> {};
INSTANTIATE_TEST_SUITE_P(Packings, CheckpointDeathTest,
                         ::testing::Values(Packing::kNone, Packing::kFloat, Packing::kInt8, Packing::kFp8,
                                           Packing::kInt4));

TEST_P(CheckpointDeathTest, PeakMemoryIsThatOfTheWeights) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  Config config = checkpoint_config(8);
  config.hidden_size = 1024;
  config.intermediate_size = 3072;
  config.head_dim = 32;
  std::string header;
  uint64_t end = 0;
  for (const WeightSlice& slice : weight_slices(config, WeightNames::kHuggingFace)) {
    std::string shape;
    for (const int64_t size : slice.shape) shape += (shape.empty() ? "" : ",") + std::to_string(size);
    const uint64_t begin = end;
    end += static_cast<uint64_t>(2 * slice.rows() * slice.cols());
    header += (header.empty() ? "{\"" : ",\"") + slice.tensor + R"(":{"dtype":"BF16","shape":[)" + shape +
              R"(],"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) + "]}";
  }
  ASSERT_GT(end, 300'000'000u);
  const TempFolder folder;
  write_file(folder / "model.safetensors", safetensors(header + "}", ""));
  std::filesystem::resize_file(folder / "model.safetensors", 9 + header.size() + end);
  const auto run = [&] {
    MixtralImpl(checkpoint_config(0), torch::kBFloat16, torch::kCPU).init_random(1);  // warm up
    const int64_t before = peak_memory();
    const MixtralImpl model(config, torch::kBFloat16, torch::kCPU, GetParam());
    double weights = 0;
    for (const torch::Tensor& parameter : model.parameters()) weights += static_cast<double>(parameter.nbytes());
    Checkpoint(folder.path(), config).read_into(model.named_parameters(), GetParam(), nullptr);
    const double grown = static_cast<double>(peak_memory() - before);
    std::cerr << "peak " << grown / weights << " x the weights";
    const double staging = GetParam() == Packing::kNone ? 0 : 64 << 20;  // rows on their way
    std::_Exit(grown < 1.1 * weights + staging ? 0 : 1);
  };
  EXPECT_EXIT(run(), ::testing::ExitedWithCode(0), "");
}

// Accepted or LoadError: any other exception fails the test, and a signal ends it.
TEST(Checkpoint, SurvivesEveryBitFlipOfItsHeader) {
  Config config = checkpoint_config(0);
  config.num_layers = 1;
  const std::string valid = file_bytes(random_tensors(config, WeightNames::kHuggingFace, torch::kBFloat16));
  const size_t header_end = valid.find("}}") + 2;
  const Parameters parameters = empty_parameters(config, torch::kBFloat16);
  const TempFolder folder;
  testing::for_each_bit_flip(folder / "model.safetensors", valid, 8 * header_end, [&] {
    try {
      Checkpoint(folder.path(), config).read_into(parameters, Packing::kNone, nullptr);
    } catch (const LoadError&) {
    }
  });
}

}  // namespace
}  // namespace mixtral
