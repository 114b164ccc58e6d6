// Models whose weights are views of mapped files: the same bits, nothing copied, only what is used in memory.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

#include "checkpoint/from_pretrained.h"
#include "checkpoint/save.h"
#include "checkpoint_files.h"
#include "engine/routing_observer.h"
#include "io/mapped_file.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

using testing::expect_load_error;
using testing::TempFolder;
using testing::write_file;

Mixtral map_folder(const std::filesystem::path& folder, bool read_ahead = true) {
  LoadOptions options;
  options.weights = Weights::kMmap;
  options.read_ahead = read_ahead;
  return from_pretrained(folder, options);
}

// Whether the memory is of a mapping of a file with this name.
bool lies_in(const std::string& file, const void* address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const size_t dash = line.find('-');
    const auto begin = std::stoull(line.substr(0, dash), nullptr, 16);
    const auto end = std::stoull(line.substr(dash + 1), nullptr, 16);
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (begin <= at && at < end) return line.find(file) != std::string::npos;
  }
  return false;
}

struct Format {
  const char* name;
  torch::ScalarType dtype;
  Packing packing;
};

class MappedFormat : public ::testing::TestWithParam<Format> {};

TEST_P(MappedFormat, ViewsHaveTheBitsOfWhatIsRead) {
  const auto [name, dtype, packing] = GetParam();
  const TempFolder folder;
  const Mixtral model = packed_model(tiny_model(packable_config(), dtype), packing);
  save_packed(*model, folder.path(), folder / "out");
  Mixtral read = from_pretrained(folder / "out"), mapped = map_folder(folder / "out");
  EXPECT_EQ(mapped->weight_type().name(), name);
  const auto expected = read->named_parameters();
  for (const auto& item : mapped->named_parameters()) {
    const torch::Tensor& tensor = item.value();
    EXPECT_EQ(tensor.sizes(), expected[item.key()].sizes()) << item.key();
    EXPECT_EQ(0, std::memcmp(tensor.data_ptr(), expected[item.key()].data_ptr(), tensor.nbytes())) << item.key();
    EXPECT_TRUE(lies_in("out/model.safetensors", tensor.data_ptr())) << item.key();
    EXPECT_FALSE(lies_in("out/model.safetensors", expected[item.key()].data_ptr())) << item.key();
  }
  const auto ids = random_ids(30, model->config().vocab_size, 1);
  EXPECT_TRUE(same_bits(whole(mapped, ids).to(torch::kFloat32), whole(read, ids).to(torch::kFloat32)));
}

INSTANTIATE_TEST_SUITE_P(All, MappedFormat,
                         ::testing::Values(Format{"float32", torch::kFloat32, Packing::kFloat},
                                           Format{"bfloat16", torch::kBFloat16, Packing::kFloat},
                                           Format{"float16", torch::kHalf, Packing::kFloat},
                                           Format{"int8", torch::kBFloat16, Packing::kInt8},
                                           Format{"fp8", torch::kBFloat16, Packing::kFp8},
                                           Format{"int4", torch::kBFloat16, Packing::kInt4}),
                         [](const auto& format) { return format.param.name; });

TEST(MappedWeights, DenseModelsAreMappedToo) {
  const TempFolder folder;
  const Mixtral model = packed_model(tiny_model(packable_config(/*num_experts=*/0)), Packing::kFloat);
  save_packed(*model, folder.path(), folder / "out");
  Mixtral read = from_pretrained(folder / "out"), mapped = map_folder(folder / "out");
  EXPECT_FALSE(mapped->expert_runner());
  const auto ids = random_ids(30, model->config().vocab_size, 1);
  EXPECT_TRUE(same_bits(whole(mapped, ids), whole(read, ids)));
}

TEST(MappedWeights, WritingToAParameterLeavesTheFileAsItWas) {
  const torch::NoGradGuard no_grad;
  const TempFolder folder;
  const Mixtral model = packed_model(tiny_model(packable_config()), Packing::kFloat);
  save_packed(*model, folder.path(), folder / "out");
  map_folder(folder / "out")->named_parameters()["layers.1.moe.down_proj"].fill_(7);
  const auto after = map_folder(folder / "out")->named_parameters()["layers.1.moe.down_proj"];
  EXPECT_TRUE(torch::equal(after, model->named_parameters()["layers.1.moe.down_proj"]));
}

TEST(MappedWeights, DamagedFilesAreErrorsBeforeUse) {
  const TempFolder folder;
  save_packed(*packed_model(tiny_model(packable_config()), Packing::kFloat), folder.path(), folder / "out");
  const auto file = folder / "out" / "model.safetensors";
  const auto size = std::filesystem::file_size(file);
  std::filesystem::resize_file(file, size - 1);
  expect_load_error([&] { map_folder(folder / "out"); }, "is cut short");
  std::filesystem::resize_file(file, size + 1);
  expect_load_error([&] { map_folder(folder / "out"); }, "must end with its last tensor");
}

TEST(MappedWeights, AFileThatShrinksBeforeItIsMappedIsAnError) {
  const TempFolder folder;
  write_file(folder / "file", std::string(10000, 'x'));
  const File file(folder / "file");
  EXPECT_EQ(MappedFile(file).data()[9999], 'x');
  std::filesystem::resize_file(folder / "file", 5000);
  expect_load_error([&] { MappedFile mapped(file); }, "has changed");
}

// ---- residency
// -------------------------------------------------------------------------------------------------------

// One layer of eight experts of 24 MiB, so that the pages that the system reads around others are few.
Config config_of_large_experts() {
  Config config = packable_config(/*num_experts=*/8);
  config.hidden_size = 1024;
  config.intermediate_size = 4096;
  config.num_layers = 1;
  return config;
}

// Writes the file to the disk and drops its pages; whether they are gone.
bool drop_from_memory(const std::filesystem::path& path) {
  const File file(path);
  ::fsync(file.descriptor());
  ::posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED);
  const MappedFile mapped(file);
  uint64_t missing = 0;
  for (const PageRange& range : missing_pages(pages_around(mapped.data(), file.size()))) missing += range.bytes;
  return missing >= file.size() * 99 / 100;
}

double resident_share(const torch::Tensor& weight, int64_t expert) {
  const uint64_t bytes = weight.nbytes() / weight.size(0);
  const PageRange range = pages_around(static_cast<char*>(weight.data_ptr()) + expert * bytes, bytes);
  uint64_t missing = 0;
  for (const PageRange& part : missing_pages(range)) missing += part.bytes;
  return 1 - static_cast<double>(missing) / static_cast<double>(range.bytes);
}

// All tokens to experts 2 and 5.
void run_forced(Mixtral& model, int64_t tokens) {
  Batch batch = packed_batch({random_ids(tokens, model->config().vocab_size, 1)}, torch::kCPU);
  RoutingObserver observer(model->config(), /*keep_logits=*/false);
  const uint8_t experts[] = {2, 5};
  observer.force(std::vector<RoutingObserver::ForcedRow>(static_cast<size_t>(tokens), {experts, 2}));
  batch.routing = &observer;
  model->hidden_states(batch);
}

// One request to the system brings no more than the read-ahead of the disk.
TEST(MappedWeights, AllPagesThatAreAskedForCome) {
  const TempFolder folder;
  constexpr size_t kBytes = 24 << 20;
  std::ofstream(folder / "file", std::ios::binary) << std::string(kBytes, 'x');
  if (!drop_from_memory(folder / "file"))
    GTEST_SKIP() << "the file system of the temporary folder keeps files in memory";
  const File file(folder / "file");
  const MappedFile mapped(file);
  const PageRange all = pages_around(mapped.data(), kBytes);
  read_alone(all);
  read_ahead(all);
  for (int wait = 0; wait < 600 && !missing_pages(all).empty(); ++wait)
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_TRUE(missing_pages(all).empty());
}

TEST(MappedWeights, OnlyTheChosenExpertsComeIntoMemory) {
  const TempFolder folder;
  {
    Mixtral model(config_of_large_experts(), torch::kBFloat16, torch::kCPU, Packing::kFloat);
    model->init_random(1);
    save_packed(*model, folder.path(), folder / "out");
  }
  if (!drop_from_memory(folder / "out" / "model.safetensors"))
    GTEST_SKIP() << "the file system of the temporary folder keeps files in memory";
  Mixtral model = map_folder(folder / "out");
  run_forced(model, 3);
  const ExpertCounts first = model->expert_runner()->counts();
  EXPECT_EQ(first.hits, 0);
  EXPECT_EQ(first.misses, 6);
  const auto parameters = model->named_parameters();
  double chosen = 0, resident = 0;  // experts
  for (const char* name : {"layers.0.moe.gate_up_proj", "layers.0.moe.down_proj"}) {
    for (int64_t expert = 0; expert < 8; ++expert) {
      const bool is_chosen = expert == 2 || expert == 5;
      const double share = resident_share(parameters[name], expert);
      chosen += is_chosen;
      resident += share;
      EXPECT_NEAR(share, is_chosen, 0.02) << name << " of expert " << expert;
    }
  }
  EXPECT_NEAR(resident / chosen, 1, 0.02);
  run_forced(model, 3);
  const ExpertCounts second = model->expert_runner()->counts();
  EXPECT_EQ(second.hits, 6);
  EXPECT_EQ(second.misses, 6);
  EXPECT_EQ(second.bytes, first.bytes);
}

// ---- locked
// ----------------------------------------------------------------------------------------------------------

// Sum over the mappings of a file with this name, in bytes: "Locked", "Anonymous", ...
int64_t of_mappings(const std::string& file, const std::string& field) {
  std::ifstream smaps("/proc/self/smaps");
  int64_t sum = 0;
  bool of_file = false;
  for (std::string line; std::getline(smaps, line);) {
    std::istringstream words(line);
    std::string first, second;
    words >> first >> second;
    if (first.back() != ':') of_file = line.find(file) != std::string::npos;  // a mapping begins
    if (of_file && first == field + ":") sum += std::stoll(second) * 1024;
  }
  return sum;
}

// Bytes that this process has locked.
int64_t locked_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    int64_t kib = 0;
    if (word == "VmLck:" && status >> kib) return kib * 1024;
  }
  return -1;
}

constexpr uint64_t kEnough = 7 << 20;  // for the small models, and within the usual limit

LoadOptions locked(Weights weights) {
  LoadOptions options;
  options.weights = weights;
  options.mlock = true;
  return options;
}

TEST(LockedWeights, PagesOfMappedFilesStayInMemoryAndAreNotCopied) {
  if (!may_lock(kEnough)) GTEST_SKIP() << "this user may not lock 7 MiB";
  const TempFolder folder;
  save_packed(*packed_model(tiny_model(packable_config()), Packing::kFloat), folder.path(), folder / "out");
  const auto file = folder / "out" / "model.safetensors";
  const bool dropped = drop_from_memory(file);
  Mixtral model = from_pretrained(folder / "out", locked(Weights::kMmap));
  int64_t bytes = 0;
  for (const auto& parameter : model->parameters()) bytes += static_cast<int64_t>(parameter.nbytes());
  EXPECT_GE(of_mappings("out/model.safetensors", "Locked"), bytes);
  EXPECT_EQ(of_mappings("out/model.safetensors", "Anonymous"), 0);
  EXPECT_GE(locked_bytes(), bytes);
  // The system may not drop them now.
  if (dropped) {
    EXPECT_FALSE(drop_from_memory(file));
  }
  whole(model, random_ids(5, model->config().vocab_size, 1));
  EXPECT_EQ(model->expert_runner()->counts().misses, 0);
}

TEST(LockedWeights, MemoryOfWeightsThatAreReadIsLocked) {
  if (!may_lock(kEnough)) GTEST_SKIP() << "this user may not lock 7 MiB";
  const TempFolder folder;
  save_packed(*packed_model(tiny_model(packable_config()), Packing::kFloat), folder.path(), folder / "out");
  const int64_t before = locked_bytes();
  Mixtral model = from_pretrained(folder / "out", locked(Weights::kRead));
  int64_t bytes = 0;
  for (const auto& parameter : model->parameters()) bytes += static_cast<int64_t>(parameter.nbytes());
  EXPECT_GE(locked_bytes() - before, bytes);
  const auto ids = random_ids(30, model->config().vocab_size, 1);
  Mixtral unlocked = from_pretrained(folder / "out");
  EXPECT_TRUE(same_bits(whole(model, ids), whole(unlocked, ids)));
}

TEST(MappedWeights, CountsEveryChoiceOfEveryLayer) {
  const TempFolder folder;
  save_packed(*packed_model(tiny_model(packable_config()), Packing::kFloat), folder.path(), folder / "out");
  Mixtral model = map_folder(folder / "out");
  whole(model, random_ids(13, model->config().vocab_size, 1));
  const ExpertCounts counts = model->expert_runner()->counts();
  EXPECT_EQ(counts.hits + counts.misses, 2 * 2 * 13);
  EXPECT_FALSE(map_folder(folder / "out", /*read_ahead=*/false)->expert_runner());
}

}  // namespace
}  // namespace mixtral
