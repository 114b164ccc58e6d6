// What each rank reads of a checkpoint, against the slices of what a single process reads.
#include <cstring>
#include <iostream>

#include "checkpoint/weights.h"
#include "checkpoint_files.h"
#include "checkpoint_tensors.h"
#include "little_endian.h"
#include "model/memory.h"
#include "model/packing.h"
#include "model/parameters.h"
#include "model/placement.h"

namespace mixtral {
namespace {

using testing::bytes_of;
using testing::checkpoint_config;
using testing::expect_load_error;
using testing::file_bytes;
using testing::random_tensors;
using testing::safetensors;
using testing::TempFolder;
using testing::Tensors;
using testing::write_file;
using Parameters = torch::OrderedDict<std::string, torch::Tensor>;

// Can be packed by four ranks, of which two share a key/value head.
Config splittable_config(int64_t num_experts) {
  Config config = checkpoint_config(num_experts, {128, 128, 32, 256});
  config.select_bias = num_experts > 0;
  return config;
}

std::vector<Placement> placements() {
  std::vector<Placement> all;
  for (const auto& [tensor_size, stages] : {std::pair(2, 1), std::pair(4, 1), std::pair(1, 2), std::pair(2, 2)})
    for (const bool expert_parallel : {true, false})
      for (int rank = 0; rank < tensor_size * stages; ++rank)
        all.push_back(Placement::of_rank(rank, tensor_size, stages, expert_parallel));
  return all;
}

LoadOptions options_of(const Placement& placement, const std::filesystem::path& lora = {}) {
  LoadOptions options;
  options.placement = placement;
  options.lora = lora;
  return options;
}

// What a rank holds, filled with bytes that no checkpoint has.
Parameters rank_parameters(const Config& config, const WeightType& type, const Placement& placement) {
  Parameters parameters;
  for (Parameter& parameter : placed_parameters(config, placement)) {
    parameter.shape = shard_of(parameter, config, placement).shape;
    const auto tensor = empty_parameter(parameter, scalar_type(type.dtype), torch::kCPU, type.packing);
    std::memset(tensor.data_ptr(), 0xff, tensor.nbytes());
    parameters.insert(parameter.name, tensor);
  }
  return parameters;
}

Parameters load_rank(const std::filesystem::path& folder, const Config& config, const WeightType& type,
                     const LoadOptions& options = {}) {
  const Parameters parameters = rank_parameters(config, type, options.placement);
  Checkpoint(folder, config, options).read_into(parameters, type.packing, nullptr);
  return parameters;
}

// The rank's rows, or blocks of 32 of them, and its columns.
torch::Tensor cut(const torch::Tensor& whole, const Parameter& parameter, const ParameterShard& shard) {
  const bool packed = is_packed(whole), all_columns = shard.columns == parameter.shape.back();
  const int64_t unit = packed ? kPackedRows : 1;
  const auto rows = packed ? whole.flatten(0, 1) : whole.view({-1, parameter.shape.back()});
  std::vector<torch::Tensor> parts;
  for (const RowRange& range : shard.rows) {
    const auto part = rows.narrow(0, range.begin / unit, (range.end - range.begin) / unit);
    parts.push_back(all_columns ? part : part.narrow(1, shard.first_column / unit, shard.columns / unit));
  }
  return torch::cat(parts);
}

// Blocks of int8 and fp8 have scales of whole rows: a part of the columns is quantised by itself.
bool has_row_scales(Packing packing) { return packing == Packing::kInt8 || packing == Packing::kFp8; }

// `plain`: the whole parameters in the type of the file.
void expect_slices(const Parameters& part, const Parameters& whole, const Parameters& plain, const Config& config,
                   const WeightType& type, const Placement& placement, const std::string& what) {
  size_t count = 0;
  for (const Parameter& parameter : placed_parameters(config, placement)) {
    const ParameterShard shard = shard_of(parameter, config, placement);
    const torch::Tensor& own = part[parameter.name];
    const bool own_scales = shard.columns != parameter.shape.back() && has_row_scales(type.packing);
    const torch::Tensor expected = own_scales ? pack_rows(cut(plain[parameter.name], parameter, shard), type.packing)
                                              : cut(whole[parameter.name], parameter, shard).contiguous();
    ASSERT_EQ(own.scalar_type(), expected.scalar_type()) << what << " " << parameter.name;
    ASSERT_EQ(own.nbytes(), expected.nbytes()) << what << " " << parameter.name;
    ASSERT_EQ(std::memcmp(own.data_ptr(), expected.data_ptr(), own.nbytes()), 0)
        << what << " " << parameter.name << " of " << placement.name();
    ++count;
  }
  EXPECT_EQ(part.size(), count);
}

const WeightType kTypes[] = {{"float32", Packing::kNone},  {"bfloat16", Packing::kNone}, {"bfloat16", Packing::kFloat},
                             {"bfloat16", Packing::kInt8}, {"bfloat16", Packing::kFp8},  {"bfloat16", Packing::kInt4}};

void expect_every_rank_reads_its_slices(const std::filesystem::path& folder, const Config& config,
                                        const std::string& what, const WeightType& file_type = {"bfloat16"},
                                        const std::filesystem::path& lora = {}) {
  const Parameters plain = load_rank(folder, config, file_type, options_of({}, lora));
  for (const WeightType& type : kTypes) {
    const Parameters whole = load_rank(folder, config, type, options_of({}, lora));
    for (const Placement& placement : placements()) {
      const Parameters part = load_rank(folder, config, type, options_of(placement, lora));
      expect_slices(part, whole, plain, config, type, placement, what + " " + type.name());
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

const char* file_name(CheckpointLayout layout) {
  return layout == CheckpointLayout::kConsolidated ? "consolidated.safetensors" : "model.safetensors";
}

TEST(RankCheckpoint, EverySafetensorsSpelling) {
  for (const WeightNames names : {WeightNames::kHuggingFace, WeightNames::kHuggingFaceMerged,
                                  WeightNames::kConsolidated, WeightNames::kStacked}) {
    for (const int64_t experts : {4, 0}) {
      if (experts == 0 && (names == WeightNames::kHuggingFaceMerged || names == WeightNames::kStacked)) continue;
      Config config = splittable_config(experts);
      config.tie_word_embeddings = names == WeightNames::kHuggingFaceMerged;
      const bool mistral = names == WeightNames::kConsolidated || names == WeightNames::kStacked;
      if (mistral) config.layout = CheckpointLayout::kConsolidated;
      const TempFolder folder;
      write_file(folder / file_name(config.layout), file_bytes(random_tensors(config, names, torch::kBFloat16)));
      expect_every_rank_reads_its_slices(folder.path(), config, "spelling " + std::to_string(static_cast<int>(names)));
    }
  }
}

TEST(RankCheckpoint, MatricesOfOneTensorGoToTheRanksOfTheirExperts) {
  Config config = splittable_config(4);
  config.layout = CheckpointLayout::kConsolidated;
  const Tensors tensors = random_tensors(config, WeightNames::kStacked, torch::kBFloat16);
  const TempFolder folder;
  write_file(folder / "consolidated.safetensors", file_bytes(tensors));
  const auto matrix = [&](const char* name, int64_t expert) {
    return tensors.at(std::string("layers.1.block_sparse_moe.") + name).view({4, 128, 128})[expert];
  };
  for (int rank = 0; rank < 2; ++rank) {
    const Parameters part =
        load_rank(folder.path(), config, {"bfloat16"}, options_of(Placement::of_rank(rank, 2, 1, true)));
    for (int64_t e = 0; e < 2; ++e) {
      const auto gate_up = torch::cat({matrix("w1", 2 * rank + e), matrix("w3", 2 * rank + e)});
      EXPECT_TRUE(torch::equal(part["layers.1.moe.gate_up_proj"][e], gate_up));
      EXPECT_TRUE(torch::equal(part["layers.1.moe.down_proj"][e], matrix("w2", 2 * rank + e).t()));
    }
  }
}

// A GGUF file whose matrices are Q8_0: blocks of 32 numbers, a scale (f16) and 32 i8.
std::string gguf_bytes(const Config& config, WeightNames names) {
  const auto text = [](const std::string& value) { return bytes_of<uint64_t>(value.size()) + value; };
  std::string infos, data;
  uint64_t count = 0;
  for (const auto& [name, tensor] : random_tensors(config, names, torch::kFloat32)) {
    const bool quantized = tensor.dim() > 1 && tensor.size(-1) % 32 == 0;
    infos += text(name) + bytes_of(static_cast<uint32_t>(tensor.dim()));
    for (int64_t d = tensor.dim() - 1; d >= 0; --d) infos += bytes_of(static_cast<uint64_t>(tensor.size(d)));
    infos += bytes_of<uint32_t>(quantized ? 8 : 0) + bytes_of<uint64_t>(data.size());
    if (quantized) {
      const auto numbers = tensor.mul(40).clamp(-127, 127).to(torch::kInt8).view({-1, 32});
      for (int64_t block = 0; block < numbers.size(0); ++block) {
        data += bytes_of<uint16_t>(static_cast<uint16_t>(0x2000 + block % 7));  // about 2^-7
        data.append(reinterpret_cast<const char*>(numbers[block].data_ptr()), 32);
      }
    } else {
      data.append(static_cast<const char*>(tensor.data_ptr()), tensor.nbytes());
    }
    data.append((32 - data.size() % 32) % 32, '\0');
    ++count;
  }
  std::string header = "GGUF" + bytes_of<uint32_t>(3) + bytes_of(count) + bytes_of<uint64_t>(0) + infos;
  header.append((32 - header.size() % 32) % 32, '\0');
  return header + data;
}

TEST(RankCheckpoint, BothSpellingsOfGguf) {
  for (const WeightNames names : {WeightNames::kGguf, WeightNames::kGgufMerged}) {
    Config config = splittable_config(4);
    config.layout = CheckpointLayout::kGguf;
    config.select_bias = false;
    const TempFolder folder;
    write_file(folder / "model.gguf", gguf_bytes(config, names));
    expect_every_rank_reads_its_slices(folder.path(), config, "gguf", {"float32"});
  }
}

TEST(RankCheckpoint, BlocksOfGgufAreNotCut) {
  Config config = splittable_config(4);
  config.layout = CheckpointLayout::kGguf;
  config.intermediate_size = 96;  // 48 columns for each of two ranks
  config.select_bias = false;
  const TempFolder folder;
  write_file(folder / "model.gguf", gguf_bytes(config, WeightNames::kGguf));
  const auto open = [&](bool expert_parallel) {
    Checkpoint(folder.path(), config, options_of(Placement::of_rank(0, 2, 1, expert_parallel)));
  };
  EXPECT_NO_THROW(open(true));
  expect_load_error([&] { open(false); }, "48 of its columns are for one rank, but Q8_0 has blocks of 32");
}

// Writes what `mixtral quantize` writes, without its folder.
void write_quantized(const std::filesystem::path& path, const Parameters& parameters) {
  Tensors tensors;
  for (const auto& item : parameters) tensors[item.key()] = item.value();
  write_file(path, file_bytes(tensors));
}

TEST(RankCheckpoint, BlocksOfAQuantisedCheckpointAreCopied) {
  Config config = splittable_config(4);
  const TempFolder original;
  write_file(original / "model.safetensors",
             file_bytes(random_tensors(config, WeightNames::kHuggingFace, torch::kBFloat16)));
  for (const WeightType& type : kTypes) {
    if (!is_quantized(type.packing)) continue;
    Config quantized = config;
    quantized.quantization = type.name();
    const Parameters whole = load_rank(original.path(), config, type);
    const TempFolder folder;
    write_quantized(folder / "model.safetensors", whole);
    for (const Placement& placement : placements()) {
      const bool cuts_columns = !placement.expert_parallel && placement.tensor_size > 1;
      if (cuts_columns && has_row_scales(type.packing)) {
        try {
          Checkpoint(folder.path(), quantized, options_of(placement));
          ADD_FAILURE() << type.name();
        } catch (const std::invalid_argument& error) {
          EXPECT_NE(std::string(error.what()).find("down_proj"), std::string::npos) << error.what();
        }
        continue;
      }
      const Parameters part = load_rank(folder.path(), quantized, type, options_of(placement));
      expect_slices(part, whole, whole, quantized, type, placement, type.name());
      if (HasFatalFailure()) return;
    }
  }
}

// Pairs of random matrices of rank 3 for every kind of matrix, and a whole lm_head.
void write_adapter(const std::filesystem::path& folder, const Config& config) {
  Tensors tensors;
  const auto add = [&](const std::string& module, int64_t rows, int64_t cols) {
    tensors["base_model.model." + module + ".lora_A.weight"] = torch::randn({3, cols});
    tensors["base_model.model." + module + ".lora_B.weight"] = torch::randn({rows, 3});
  };
  torch::manual_seed(7);
  const int64_t H = config.hidden_size, D = config.head_dim, I = config.intermediate_size;
  for (const std::string layer : {"model.layers.0.", "model.layers.1."}) {
    add(layer + "self_attn.q_proj", config.num_heads * D, H);
    add(layer + "self_attn.v_proj", config.num_kv_heads * D, H);
    add(layer + "self_attn.o_proj", H, config.num_heads * D);
    for (const std::string expert : {"0", "3"}) {
      add(layer + "block_sparse_moe.experts." + expert + ".w1", I, H);
      add(layer + "block_sparse_moe.experts." + expert + ".w2", H, I);
    }
  }
  tensors["base_model.model.lm_head.weight"] = torch::randn({config.vocab_size, H});
  write_file(folder / "adapter_config.json", R"({"peft_type":"LORA","r":3,"lora_alpha":4})");
  write_file(folder / "adapter_model.safetensors", file_bytes(tensors));
}

TEST(RankCheckpoint, AdaptersAreMergedIntoTheRowsOfTheRank) {
  for (const WeightNames names : {WeightNames::kHuggingFace, WeightNames::kHuggingFaceMerged, WeightNames::kStacked}) {
    Config config = splittable_config(4);
    if (names == WeightNames::kStacked) config.layout = CheckpointLayout::kConsolidated;
    const TempFolder folder, lora;
    write_file(folder / file_name(config.layout), file_bytes(random_tensors(config, names, torch::kFloat32)));
    write_adapter(lora.path(), config);
    const Parameters plain = load_rank(folder.path(), config, {"float32"});
    const Parameters merged = load_rank(folder.path(), config, {"float32"}, options_of({}, lora.path()));
    for (const char* changed : {"lm_head", "layers.1.attention.qkv_proj", "layers.1.moe.down_proj"})
      EXPECT_FALSE(torch::equal(plain[changed], merged[changed])) << changed;
    expect_every_rank_reads_its_slices(folder.path(), config, "adapter", {"float32"}, lora.path());
  }
}

// Bytes that this process has read from files.
int64_t bytes_read() {
  std::ifstream io("/proc/self/io");
  std::string name;
  int64_t count = 0;
  io >> name >> count;
  return name == "rchar:" ? count : throw std::runtime_error("/proc/self/io has no rchar");
}

TEST(RankCheckpoint, ReadsTheBytesOfItsRowsAlone) {
  const Config config = splittable_config(4);
  for (const WeightNames names : {WeightNames::kHuggingFace, WeightNames::kHuggingFaceMerged}) {
    const TempFolder folder;
    write_file(folder / "model.safetensors", file_bytes(random_tensors(config, names, torch::kBFloat16)));
    for (const Placement& placement : placements()) {
      int64_t expected = 0;
      for (const Parameter& parameter : placed_parameters(config, placement)) {
        int64_t size = 1;
        for (const int64_t d : shard_of(parameter, config, placement).shape) size *= d;
        expected += 2 * size;
      }
      const Checkpoint checkpoint(folder.path(), config, options_of(placement));
      EXPECT_EQ(checkpoint.bytes(), static_cast<uint64_t>(expected)) << placement.name();
      const Parameters part = rank_parameters(config, {"bfloat16"}, placement);
      uint64_t last = 0;
      const int64_t before = bytes_read();
      checkpoint.read_into(part, Packing::kNone, [&](uint64_t done, uint64_t) { last = done; });
      EXPECT_NEAR(static_cast<double>(bytes_read() - before), static_cast<double>(expected),
                  4096);  // and /proc/self/io
      EXPECT_EQ(last, checkpoint.bytes());
    }
  }
}

TEST(RankCheckpoint, AMissingFileIsNamedOnEveryRank) {
  const Config config = splittable_config(4);
  const TempFolder folder;
  Tensors first, second;
  for (const auto& [name, tensor] : random_tensors(config, WeightNames::kHuggingFace, torch::kBFloat16))
    (name.find("layers.1.") == std::string::npos ? first : second)[name] = tensor;
  write_file(folder / "model-1.safetensors", file_bytes(first));
  write_file(folder / "model-2.safetensors", file_bytes(second));
  std::string index;
  for (const Tensors* shard : {&first, &second})
    for (const auto& [name, tensor] : *shard)
      index +=
          (index.empty() ? "{\"" : ",\"") + name + "\":\"model-" + (shard == &first ? "1" : "2") + ".safetensors\"";
  write_file(folder / "model.safetensors.index.json", R"({"metadata":{},"weight_map":)" + index + "}}");
  for (const Placement& placement : placements())
    EXPECT_NO_THROW(load_rank(folder.path(), config, {"bfloat16"}, options_of(placement)));
  std::filesystem::remove(folder / "model-2.safetensors");
  for (const Placement& placement : placements()) {
    expect_load_error([&] { Checkpoint(folder.path(), config, options_of(placement)); },
                      "model-2.safetensors: is listed, but there is no such file");
  }
}

TEST(RankCheckpoint, NonFiniteWeightsAreNamedByTheirPlaceInTheFile) {
  const Config config = splittable_config(4);
  Tensors tensors = random_tensors(config, WeightNames::kHuggingFaceMerged, torch::kBFloat16);
  tensors["model.layers.1.mlp.experts.down_proj"][3][5][100] = NAN;
  const TempFolder folder;
  write_file(folder / "model.safetensors", file_bytes(tensors));
  for (const bool expert_parallel : {true, false}) {
    for (int rank = 0; rank < 2; ++rank) {
      LoadOptions options = options_of(Placement::of_rank(rank, 2, 1, expert_parallel));
      options.check_weights = true;
      const auto read = [&] { load_rank(folder.path(), config, {"bfloat16"}, options); };
      if (rank == 0) {
        EXPECT_NO_THROW(read());  // it has neither expert 3 nor column 100
      } else {
        expect_load_error(read, "down_proj: holds NaN in row " + std::to_string(3 * 128 + 5) + ", column 100");
      }
    }
  }
}

TEST(RankCheckpoint, WhatCannotBeCutIsRefused) {
  const Config config = splittable_config(4);
  const TempFolder folder;
  write_file(folder / "model.safetensors",
             file_bytes(random_tensors(config, WeightNames::kHuggingFace, torch::kBFloat16)));
  EXPECT_THROW(Checkpoint(folder.path(), config, options_of(Placement::of_rank(0, 3, 1, true))), std::invalid_argument);
}

int64_t resident_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmRSS:", 0) == 0) return std::stoll(line.substr(6)) * 1024;
  throw std::runtime_error("/proc/self/status has no VmRSS");
}

// In a child process, whose memory is its own. The file is sparse, so writing it costs no memory.
class RankCheckpointDeathTest : public ::testing::TestWithParam<Packing> {};
INSTANTIATE_TEST_SUITE_P(Packings, RankCheckpointDeathTest,
                         ::testing::Values(Packing::kNone, Packing::kFloat, Packing::kInt8));

TEST_P(RankCheckpointDeathTest, ResidentMemoryIsThatOfTheSlice) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  Config config = splittable_config(8);
  config.hidden_size = 1024;
  config.intermediate_size = 2048;
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
  ASSERT_GT(end, 200'000'000u);
  const TempFolder folder;
  write_file(folder / "model.safetensors", safetensors(header + "}", ""));
  std::filesystem::resize_file(folder / "model.safetensors", 9 + header.size() + end);
  const auto run = [&](bool expert_parallel) {
    const Placement placement = Placement::of_rank(1, 2, 1, expert_parallel);
    const WeightType type = {"bfloat16", GetParam()};
    const Config warm_up = splittable_config(4);
    const TempFolder small;
    write_file(small / "model.safetensors",
               file_bytes(random_tensors(warm_up, WeightNames::kHuggingFace, torch::kBFloat16)));
    load_rank(small.path(), warm_up, type, options_of(placement));
    release_free_memory();
    const int64_t before = resident_memory();
    Parameters part;
    double weights = 0;
    for (Parameter& parameter : placed_parameters(config, placement)) {
      parameter.shape = shard_of(parameter, config, placement).shape;
      part.insert(parameter.name, empty_parameter(parameter, torch::kBFloat16, torch::kCPU, type.packing));
      weights += static_cast<double>(part[parameter.name].nbytes());
    }
    Checkpoint(folder.path(), config, options_of(placement)).read_into(part, type.packing, nullptr);
    release_free_memory();
    const double grown = static_cast<double>(resident_memory() - before);
    std::cerr << "resident " << grown / weights << " x the slice of " << weights / 1e6 << " MB";
    std::_Exit(0.9 * weights < grown && grown < 1.05 * weights ? 0 : 1);
  };
  for (const bool expert_parallel : {true, false})
    EXPECT_EXIT(run(expert_parallel), ::testing::ExitedWithCode(0), "resident");
}

}  // namespace
}  // namespace mixtral
