// The input is a model.safetensors.index.json for the two shards of the folder, a.safetensors and b.safetensors.
#include "checkpoint/files.h"
#include "fuzz.h"

using namespace mixtral;

namespace {

void write_shard(const std::string& file, const std::string& tensor) {
  const std::string header = "{\"" + tensor + "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}";
  std::string length(8, '\0');
  length[0] = static_cast<char>(header.size());
  fuzzing::write(file, length + header + "x");
}

}  // namespace

void fuzz(std::string_view input) {
  write_shard("a.safetensors", "module.model.norm.weight");
  write_shard("b.safetensors", "module.lm_head.weight");
  fuzzing::write("model.safetensors.index.json", input);
  size_t said = 0;
  const auto files = open_files(fuzzing::folder(), CheckpointLayout::kHuggingFace,
                                [&](const std::string& warning) { said += warning.size(); });
  fuzzing::check(!files.empty() && files.size() <= 2, "only files of the folder are opened");
}
