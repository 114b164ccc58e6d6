#include "lora_config.h"

#include <cctype>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <tuple>

#include "../io/file.h"
#include "../io/file_kind.h"
#include "../io/json_fields.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr uint64_t kMaxAdapterConfigBytes = 4 << 20;
constexpr double kMistralScaling = 2;  // of mistral-finetune, where nothing else is said

json read_json(const fs::path& path) {
  check_kind(File(path));
  return parse_json(read_text(path, kMaxAdapterConfigBytes), path.string());
}

std::vector<std::pair<std::string, double>> read_pattern(const JsonFields& fields, const char* key) {
  std::vector<std::pair<std::string, double>> patterns;
  if (!fields.find(key)) return patterns;
  if (!fields.at(key).is_object()) fields.fail(key, "must be an object, got " + shown(fields.at(key)));
  for (const auto& [pattern, value] : fields.at(key).items()) {
    if (!value.is_number()) fields.fail(key, "must hold numbers, got " + shown(value));
    try {
      fits_pattern(pattern, "");
    } catch (const std::invalid_argument& error) {
      fields.fail(key, error.what());
    }
    patterns.emplace_back(pattern, value.get<double>());
  }
  return patterns;
}

// The version is written since 0.18: none is before 0.19.1.
bool before_0_19_1(const JsonFields& fields) {
  if (!fields.find("peft_version")) return true;
  int major = 0, minor = 0, patch = 0;
  std::sscanf(fields.string("peft_version").c_str(), "%9d.%9d.%9d", &major, &minor, &patch);
  return std::tuple(major, minor, patch) < std::tuple(0, 19, 1);
}

LoraConfig read_peft(const fs::path& folder) {
  const std::string source = (folder / "adapter_config.json").string();
  const json object = read_json(source);
  const JsonFields fields(object, source);
  if (fields.string("peft_type") != "LORA")
    fields.fail("peft_type", "must be \"LORA\", got " + shown(fields.at("peft_type")));
  // Each of these is more than W + s B A.
  fields.reject({"use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layer_replication",
                 "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "megatron_config",
                 "trainable_token_indices"});
  if (fields.find("bias") && fields.string("bias") != "none")
    fields.fail("bias", "must be \"none\": Mixtral has no biases; got " + shown(fields.at("bias")));
  if (const json* start = fields.find("init_lora_weights"); start && start->is_string()) {
    const std::string name = *start;
    if (name != "gaussian" && name != "eva" && name != "orthogonal")
      fields.fail("init_lora_weights",
                  "changes the base weights too, got " + shown(*start) +
                      ": save the adapter as plain LoRA (path_initial_model_for_weight_conversion)");
  }
  LoraConfig config;
  config.weights = folder / "adapter_model.safetensors";
  if (!file_exists(config.weights)) {
    throw LoadError(folder.string(), "",
                    std::string("holds no adapter_model.safetensors") +
                        (file_exists(folder / "adapter_model.bin") ? ": save the adapter anew with a newer PEFT" : ""));
  }
  config.rank = fields.number("r");
  config.alpha = fields.number("lora_alpha");
  config.use_rslora = fields.boolean("use_rslora", false);
  config.rank_pattern = read_pattern(fields, "rank_pattern");
  config.alpha_pattern = read_pattern(fields, "alpha_pattern");
  config.swapped_experts = before_0_19_1(fields);
  return config;
}

LoraConfig read_mistral(const fs::path& folder) {
  LoraConfig config;
  config.weights = folder / "lora.safetensors";
  config.scaling = kMistralScaling;
  const fs::path source = folder / "params.json";
  if (!file_exists(source)) return config;
  const std::string name = source.string();
  const json object = read_json(source);
  const JsonFields fields(object, name);
  if (!fields.find("lora")) return config;
  const JsonFields lora = fields.object("lora");
  if (lora.find("scaling")) config.scaling = lora.number("scaling");
  return config;
}

double value_for(const std::vector<std::pair<std::string, double>>& patterns, const std::string& module,
                 double otherwise) {
  for (const auto& [pattern, value] : patterns)
    if (fits_pattern(pattern, module)) return value;
  return otherwise;
}

std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace

bool fits_pattern(const std::string& pattern, const std::string& module) {
  // from[i]: whether what was read of the pattern fits the first i letters.
  std::vector<bool> from(module.size() + 1, false);
  from[0] = true;
  for (size_t i = 0; i < module.size(); ++i) from[i + 1] = module[i] == '.';
  for (size_t p = 0; p < pattern.size(); ++p) {
    std::vector<bool> next(module.size() + 1, false);
    const bool escaped =
        pattern[p] == '\\' && p + 1 < pattern.size() && std::ispunct(static_cast<unsigned char>(pattern[p + 1]));
    if (escaped) ++p;
    const char c = pattern[p];
    const bool literal = escaped || std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '-';
    if (!escaped && c == '^' && p == 0) {
      next[0] = true;
    } else if (!escaped && c == '$' && p + 1 == pattern.size()) {
      next[module.size()] = from[module.size()];
    } else if (!escaped && c == '.' && p + 1 < pattern.size() && pattern[p + 1] == '*') {
      ++p;
      bool reached = false;
      for (size_t i = 0; i <= module.size(); ++i) next[i] = reached = reached || from[i];
    } else if (literal || c == '.') {
      for (size_t i = 0; i < module.size(); ++i) next[i + 1] = from[i] && (!literal || module[i] == c);
    } else {
      throw std::invalid_argument("the pattern " + shown(json(pattern)) +
                                  " has more than names, \".*\", \"^\" and \"$\", which is not supported");
    }
    from = next;
  }
  return from[module.size()];
}

double LoraConfig::scale(const std::string& module, int64_t rank_of_weights) const {
  if (alpha == 0 && rank == 0) return scaling;
  const auto found = static_cast<double>(rank_of_weights);
  const double wanted = value_for(rank_pattern, module, rank);
  if (found != wanted) {
    throw LoadError(weights.string(), module,
                    "rank must be " + number_text(wanted) + " as in adapter_config.json, got " + number_text(found));
  }
  return value_for(alpha_pattern, module, alpha) / (use_rslora ? std::sqrt(found) : found);
}

std::string adapter_advice(const fs::path& folder) {
  std::string base;
  try {
    const json config = read_json(folder / "adapter_config.json");
    base = " (" + shown(config.at("base_model_name_or_path")) + ")";
  } catch (const std::exception&) {  // no such file, or none that can be read
  }
  return ": give the model that it was made for" + base + ", and this folder to --lora";
}

LoraConfig read_lora_config(const fs::path& path) {
  const bool is_weights = path.filename() == "lora.safetensors" || path.filename() == "adapter_model.safetensors";
  const fs::path folder = is_weights ? path.parent_path() : path;
  if (file_exists(folder / "adapter_config.json")) return read_peft(folder);
  if (file_exists(folder / "lora.safetensors")) return read_mistral(folder);
  throw LoadError(
      folder.string(), "",
      file_exists(folder) ? "is no adapter: holds neither adapter_config.json nor lora.safetensors" : "does not exist");
}

}  // namespace mixtral
