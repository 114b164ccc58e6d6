// The small JSON files beside the weights, cut at each byte and with each bit flipped: read, or a LoadError.
#include "checkpoint/files.h"
#include "checkpoint/lora_config.h"
#include "checkpoint_files.h"

namespace mixtral {
namespace {

using testing::safetensors;
using testing::TempFolder;
using testing::write_file;

// How often `read` did not throw a LoadError.
template <typename Read>
int accepted(const std::filesystem::path& path, const std::string& valid, Read read) {
  int count = 0;
  const auto attempt = [&] {
    try {
      read();
      ++count;
    } catch (const LoadError&) {
    }
  };
  for (size_t size = 0; size < valid.size(); ++size) {
    write_file(path, valid.substr(0, size));
    attempt();
  }
  EXPECT_EQ(count, 0);
  testing::for_each_bit_flip(path, valid, 8 * valid.size(), attempt);
  return count;
}

TEST(DamagedJson, Index) {
  const TempFolder folder;
  for (const char* name : {"a", "b"}) {
    const std::string header = "{\"" + std::string(name) + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
    write_file(folder / (std::string(name) + ".safetensors"), safetensors(header, "x"));
  }
  const std::string valid = R"({"metadata":{"total_size":2},"weight_map":{"a":"a.safetensors","b":"b.safetensors"}})";
  const int count = accepted(folder / "model.safetensors.index.json", valid,
                             [&] { open_files(folder.path(), CheckpointLayout::kHuggingFace); });
  EXPECT_GT(count, 50);  // letters of "metadata" and "total_size"
}

TEST(DamagedJson, AdapterConfig) {
  const TempFolder folder;
  write_file(folder / "adapter_model.safetensors", "");
  const std::string valid =
      R"({"peft_type":"LORA","r":8,"lora_alpha":16,"use_rslora":true,"bias":"none","peft_version":"0.18.1",)"
      R"("rank_pattern":{"layers\\..*q_proj$":8},"target_modules":["q_proj","k_proj"]})";
  const int count = accepted(folder / "adapter_config.json", valid,
                             [&] { read_lora_config(folder.path()).scale("model.layers.0.self_attn.q_proj", 8); });
  EXPECT_GT(count, 50);  // letters of "target_modules"
}

}  // namespace
}  // namespace mixtral
