#include "files.h"

#include <algorithm>
#include <map>
#include <regex>
#include <set>
#include <string>

#include "../io/file_kind.h"
#include "../io/json.h"
#include "../io/load_error.h"
#include "../io/safetensors.h"
#include "lora_config.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxIndexBytes = 16 << 20;

// `weight_map` of an index: tensor name -> shard name. A shard is a file beside the index, never a path elsewhere.
std::map<std::string, std::string> read_index(const fs::path& path) {
  check_kind(File(path));
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

// The names in `shards` are files that exist: a download that was broken off leaves some out.
std::vector<TensorFile> open_shards(const fs::path& index, const std::map<std::string, std::string>& shards) {
  std::set<std::string> names;
  for (const auto& [tensor, shard] : shards) names.insert(shard);
  std::vector<TensorFile> files;
  for (const std::string& name : names) {
    if (!file_exists(index.parent_path() / name))
      throw LoadError(index.string(), name, "is listed, but there is no such file: download it again");
    files.push_back(open_safetensors(index.parent_path() / name));
  }
  return files;
}

// Both lists are by tensor. Which tensor of two with one name would be read is for the checkpoint to decide.
void compare_with_index(const fs::path& index, const std::map<std::string, std::string>& shards,
                        const std::vector<TensorFile>& files, const Warn& warn) {
  std::map<std::string, std::string> unlisted, absent = shards;
  for (const TensorFile& file : files) {
    const std::string name = fs::path(file.path()).filename().string();
    for (const auto& [tensor, entry] : file.entries()) {
      const auto listed = shards.find(tensor);
      if (listed == shards.end() || listed->second != name) unlisted[tensor] = name;
      absent.erase(tensor);
    }
  }
  const auto say = [&](const std::map<std::string, std::string>& tensors, const std::string& what) {
    if (warn && !tensors.empty()) {
      warn(index.string() + ": " + what + ": " + tensors.begin()->first +
           (tensors.size() > 1 ? " and " + std::to_string(tensors.size() - 1) + " more" : ""));
    }
  };
  say(absent, "lists tensors that no file holds");
  say(unlisted, "does not say where these tensors are");
}

// "model-00001-of-00003.safetensors" and the rest, when an index was not copied with them.
std::vector<TensorFile> open_loose_shards(const fs::path& folder, const std::string& stem) {
  std::map<std::string, std::set<fs::path>> sets;  // "-of-00003.safetensors" -> its files
  std::error_code ignored;
  const std::regex pattern(stem + R"(-\d{5}(-of-\d{5}\.safetensors))");
  for (const auto& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    std::smatch match;
    if (std::regex_match(name, match, pattern)) sets[match[1]].insert(entry.path());
  }
  std::vector<TensorFile> files;
  if (sets.empty()) return files;
  const auto& [end, shards] = *sets.begin();
  const size_t count = std::stoul(end.substr(4, 5));
  if (sets.size() > 1 || shards.size() != count) {
    throw LoadError(folder.string(), "",
                    "holds " + std::to_string(shards.size()) + " of " + std::to_string(count) + " files *" + end +
                        ", and no index: download it again");
  }
  for (const fs::path& shard : shards) files.push_back(open_safetensors(shard));
  return files;
}

[[noreturn]] void fail_without_weights(const fs::path& folder, const fs::path& single, const fs::path& index) {
  for (const char* adapter : {"lora.safetensors", "adapter_model.safetensors"}) {
    if (!file_exists(folder / adapter)) continue;
    throw LoadError(folder.string(), "",
                    std::string("holds an adapter, ") + adapter + ", and no model" + adapter_advice(folder));
  }
  throw LoadError(folder.string(), "",
                  "holds neither " + single.filename().string() + " nor " + index.filename().string());
}

// Without the segments that torch.compile, FSDP and PEFT put anywhere into a name.
std::string without_wrappers(std::string name) {
  for (const char* wrapper : {"_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_layer."}) {
    for (size_t at; (at = name.find(wrapper)) != std::string::npos && (at == 0 || name[at - 1] == '.');)
      name.erase(at, std::string(wrapper).size());
  }
  return name;
}

// Prefixes that every name has, as training saves them. "model." is one when names begin with it twice.
std::string common_prefix(const std::vector<TensorFile>& files) {
  const auto all_start_with = [&](const std::string& prefix) {
    for (const TensorFile& file : files)
      for (const auto& [name, entry] : file.entries())
        if (name.rfind(prefix, 0) != 0) return false;
    return true;
  };
  const auto any_starts_with = [&](const std::string& prefix) {
    return std::any_of(files.begin(), files.end(), [&](const TensorFile& file) {
      const auto next = file.entries().lower_bound(prefix);
      return next != file.entries().end() && next->first.rfind(prefix, 0) == 0;
    });
  };
  for (const char* prefix : {"module.", "base_model.model."})
    if (any_starts_with(prefix) && all_start_with(prefix)) return prefix;
  return any_starts_with("model.model.") && all_start_with("model.") ? "model." : "";
}

void strip_prefixes(std::vector<TensorFile>& files) {
  for (TensorFile& file : files) file.rename(without_wrappers);
  for (std::string prefix; !(prefix = common_prefix(files)).empty();) {
    for (TensorFile& file : files) file.rename([&](const std::string& name) { return name.substr(prefix.size()); });
  }
}

}  // namespace

std::vector<TensorFile> open_files(const fs::path& folder, CheckpointLayout layout, const Warn& warn) {
  const std::string stem = layout == CheckpointLayout::kConsolidated ? "consolidated" : "model";
  const fs::path single = folder / (stem + ".safetensors");
  const fs::path index = folder / (stem + ".safetensors.index.json");
  std::vector<TensorFile> files;
  if (file_exists(single)) {  // first, as in transformers
    files.push_back(open_safetensors(single));
    if (warn && file_exists(index)) {
      warn(folder.string() + ": holds " + single.filename().string() + " and " + index.filename().string() + "; " +
           single.filename().string() + " alone is read");
    }
  } else if (file_exists(index)) {
    const auto shards = read_index(index);
    files = open_shards(index, shards);
    compare_with_index(index, shards, files, warn);
  } else {
    files = open_loose_shards(folder, stem);
    if (files.empty()) fail_without_weights(folder, single, index);
  }
  strip_prefixes(files);
  return files;
}

}  // namespace mixtral
