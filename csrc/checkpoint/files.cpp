#include "files.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "../io/json.h"
#include "../io/load_error.h"
#include "../io/safetensors.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxIndexBytes = 100'000'000;

// `weight_map` of an index: tensor name -> shard name. A shard is a file beside the index, never a path elsewhere.
std::map<std::string, std::string> read_index(const fs::path& path) {
  const auto index = parse_json(read_text(path, kMaxIndexBytes), path.string());
  const auto found = index.find("weight_map");
  if (found == index.end() || !found->is_object() || found->empty()) {
    throw LoadError(path.string(), "weight_map", "must be an object with at least one tensor");
  }
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, shard] : found->items()) {
    const std::string name = shard.is_string() ? shard.get<std::string>() : "";
    if (name.empty() || name == "." || name == ".." ||
        name.find_first_of(std::string("/\\\0", 3)) != std::string::npos) {
      throw LoadError(path.string(), tensor, "must be in a file beside the index, got " + shown(shard));
    }
    shards[tensor] = name;
  }
  return shards;
}

// Every tensor is where the index says, and nowhere else.
void check_index(const fs::path& path, const std::map<std::string, std::string>& shards,
                 const std::vector<TensorFile>& files) {
  size_t found = 0;
  for (const TensorFile& file : files) {
    const std::string name = fs::path(file.path()).filename().string();
    for (const auto& [tensor, entry] : file.entries()) {
      const auto listed = shards.find(tensor);
      if (listed == shards.end() || listed->second != name) {
        throw LoadError(file.path(), tensor, "is in this file, but the index does not say so");
      }
      ++found;
    }
  }
  if (found == shards.size()) return;
  for (const auto& [tensor, shard] : shards) {
    const bool present = std::any_of(files.begin(), files.end(), [&, &tensor = tensor](const TensorFile& file) {
      return file.entries().count(tensor) > 0;
    });
    if (!present) throw LoadError(path.string(), tensor, "is in the index, but not in the file that it names");
  }
}

}  // namespace

std::vector<TensorFile> open_files(const fs::path& folder, CheckpointLayout layout) {
  const std::string stem = layout == CheckpointLayout::kConsolidated ? "consolidated" : "model";
  const fs::path single = folder / (stem + ".safetensors");
  const fs::path index = folder / (stem + ".safetensors.index.json");
  std::vector<TensorFile> files;
  if (fs::exists(index)) {
    const auto shards = read_index(index);
    std::set<std::string> names;
    for (const auto& [tensor, shard] : shards) names.insert(shard);
    for (const std::string& name : names) files.push_back(open_safetensors(folder / name));
    check_index(index, shards, files);
  } else if (fs::exists(single)) {
    files.push_back(open_safetensors(single));
  } else {
    throw LoadError(folder.string(), "",
                    "holds neither " + single.filename().string() + " nor " + index.filename().string());
  }
  return files;
}

}  // namespace mixtral
