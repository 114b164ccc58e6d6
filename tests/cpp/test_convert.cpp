#include <map>

#include "checkpoint/convert.h"
#include "checkpoint/from_pretrained.h"
#include "checkpoint_files.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "model/transformer.h"

namespace mixtral {
namespace {

using testing::TempFolder;

const std::filesystem::path kDemo = std::filesystem::path(MIXTRAL_SOURCE_DIR) / "models" / "demo";

TEST(Convert, WritesShardsWithAnIndex) {
  const TempFolder folder;
  constexpr uint64_t kMaxBytes = 1 << 20;
  std::vector<uint64_t> progress;
  LoadOptions options;
  options.progress = [&](uint64_t done, uint64_t total) {
    EXPECT_LE(done, total);
    progress.push_back(done);
    if (done == total) progress.push_back(total);
  };
  convert(kDemo, folder / "out", options, kMaxBytes);
  ASSERT_GT(progress.size(), 2u);
  EXPECT_EQ(progress.back(), progress[progress.size() - 2]);  // the last call says that all is done

  const auto index_path = folder / "out" / "model.safetensors.index.json";
  const auto index = parse_json(read_text(index_path, 1 << 20), index_path.string());
  std::map<std::string, int> tensors;  // of each shard
  for (const auto& [tensor, shard] : index["weight_map"].items()) ++tensors[shard];
  EXPECT_GT(tensors.size(), 5u);
  uint64_t bytes = 0;
  for (const auto& [shard, count] : tensors) {
    EXPECT_NE(shard.find("-of-" + std::string(5 - std::to_string(tensors.size()).size(), '0') +
                         std::to_string(tensors.size()) + ".safetensors"),
              std::string::npos)
        << shard;
    const TensorFile file = open_safetensors(folder / "out" / shard);
    uint64_t shard_bytes = 0;
    for (const auto& [name, entry] : file.entries()) {
      EXPECT_EQ(index["weight_map"][name], shard);
      shard_bytes += entry.end - entry.begin;
    }
    EXPECT_EQ(file.entries().size(), static_cast<size_t>(count));
    EXPECT_TRUE(shard_bytes <= kMaxBytes || count == 1) << shard;
    bytes += shard_bytes;
  }
  EXPECT_EQ(index["metadata"]["total_size"], bytes);

  const auto ours = from_pretrained(folder / "out")->named_parameters();
  for (const auto& item : from_pretrained(kDemo)->named_parameters()) {
    EXPECT_TRUE(torch::equal(*ours.find(item.key()), item.value())) << item.key();
  }
}

TEST(Convert, LeavesNothingBehindWhenItIsStopped) {
  const TempFolder folder;
  LoadOptions options;
  options.progress = [](uint64_t, uint64_t) { throw std::runtime_error("stop"); };
  EXPECT_THROW(convert(kDemo, folder / "out", options), std::runtime_error);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

}  // namespace
}  // namespace mixtral
