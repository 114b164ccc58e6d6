#include "folder.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <vector>

#include "../io/file.h"
#include "../io/load_error.h"
#include "lora_config.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMaxRefBytes = 256;

bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

bool is_folder(const fs::path& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored);
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// "~/models" and "~" as a shell would read them.
fs::path expand_home(const std::string& path) {
  if (path != "~" && path.rfind("~/", 0) != 0) return path;
  const std::string home = environment("HOME");
  return home.empty() ? fs::path(path) : fs::path(home + path.substr(1));
}

// As huggingface_hub looks for it.
fs::path hub_cache() {
  if (const std::string cache = environment("HF_HUB_CACHE"); !cache.empty()) return expand_home(cache);
  if (const std::string home = environment("HF_HOME"); !home.empty()) return expand_home(home) / "hub";
  const std::string cache = environment("XDG_CACHE_HOME");
  return (cache.empty() ? expand_home("~/.cache") : expand_home(cache)) / "huggingface" / "hub";
}

// "org/name", of the letters that the hub allows.
bool is_repository(const std::string& name) {
  const auto allowed = [](unsigned char c) { return std::isalnum(c) || c == '-' || c == '_' || c == '.' || c == '/'; };
  const size_t slash = name.find('/');
  return slash != std::string::npos && slash > 0 && slash + 1 < name.size() && name.find('/', slash + 1) == name.npos &&
         name.front() != '.' && std::all_of(name.begin(), name.end(), allowed);
}

// The snapshot of "main", or the only one. Empty: there is none.
fs::path snapshot_of(const fs::path& repository) {
  std::error_code ignored;
  if (is_there(repository / "refs" / "main")) {
    std::string revision = read_text(repository / "refs" / "main", kMaxRefBytes);
    while (!revision.empty() && std::isspace(static_cast<unsigned char>(revision.back()))) revision.pop_back();
    const bool plain = !revision.empty() && revision.find('/') == std::string::npos && revision.front() != '.';
    if (plain && is_folder(repository / "snapshots" / revision)) return repository / "snapshots" / revision;
  }
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(repository / "snapshots", ignored)) found.push_back(entry.path());
  return found.size() == 1 ? found[0] : fs::path();
}

// "models--org--name" -> "org/name"
std::string repository_name(const fs::path& folder) {
  std::string name = folder.filename().string();
  name = name.substr(name.find("--") + 2);
  const size_t dashes = name.find("--");
  return dashes == std::string::npos ? name : name.substr(0, dashes) + "/" + name.substr(dashes + 2);
}

}  // namespace

fs::path find_model(const fs::path& model) {
  fs::path path = expand_home(model.string());
  if (!path.has_filename()) path = path.parent_path();  // "folder/"
  if (is_folder(path)) {
    if (path.filename().string().rfind("models--", 0) != 0 || !is_folder(path / "snapshots")) return path;
    const fs::path snapshot = snapshot_of(path);
    if (!snapshot.empty()) return snapshot;
    throw LoadError(
        path.string(), "",
        "has no snapshot of \"main\": run `hf download " + repository_name(path) + "`, or name a folder in snapshots/");
  }
  if (is_there(path)) return path;
  const std::string name = model.string();
  if (!is_repository(name)) throw LoadError(name, "", "does not exist");
  std::string folder = "models--" + name;
  folder.replace(folder.find('/'), 1, "--");
  const fs::path cached = hub_cache() / folder;
  const fs::path snapshot = is_folder(cached) ? snapshot_of(cached) : fs::path();
  if (!snapshot.empty()) return snapshot;
  throw LoadError(name, "",
                  "is no folder here, and not in the Hugging Face cache " + hub_cache().string() +
                      ": to download it run `hf download " + name + "`");
}

bool has_weights(const fs::path& folder, CheckpointLayout layout) {
  const std::string stem = layout == CheckpointLayout::kHuggingFace ? "model" : "consolidated";
  return is_there(folder / (stem + ".safetensors")) || is_there(folder / (stem + ".safetensors.index.json"));
}

CheckpointLayout layout_of(const fs::path& folder, const Warn& warn) {
  const auto has = [&](const std::string& name) { return is_there(folder / name); };
  if (is_there(folder) && !is_folder(folder)) {
    throw LoadError(folder.string(), "", "is a file: give the folder that holds it");
  }
  if (!is_folder(folder)) throw LoadError(folder.string(), "", "is not a folder");
  if (!has("config.json") && !has("params.json")) {
    if (has("adapter_config.json")) {
      throw LoadError(folder.string(), "", "is an adapter, not a model" + adapter_advice(folder));
    }
    throw LoadError(folder.string(), "", "holds neither config.json nor params.json");
  }
  const bool hugging_face = has_weights(folder, CheckpointLayout::kHuggingFace);
  const bool consolidated = has_weights(folder, CheckpointLayout::kConsolidated);
  const bool take_hugging_face = has("config.json") && !(has("params.json") && consolidated && !hugging_face);
  if (warn && hugging_face && consolidated) {
    warn(folder.string() + ": holds model*.safetensors and consolidated*.safetensors; " +
         (take_hugging_face ? "model" : "consolidated") + "*.safetensors is read");
  }
  return take_hugging_face ? CheckpointLayout::kHuggingFace : CheckpointLayout::kConsolidated;
}

}  // namespace mixtral
