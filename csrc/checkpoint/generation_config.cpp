#include "generation_config.h"

#include <algorithm>

#include "../io/file.h"
#include "../io/json_fields.h"

namespace mixtral {
namespace {

constexpr const char* kFile = "generation_config.json";
constexpr uint64_t kMaxBytes = 1 << 20;

// Ways of generating that the engine does not have. Each is off where it is null, false, 0 or 1.
constexpr const char* kUnsupported[] = {"typical_p",
                                        "epsilon_cutoff",
                                        "eta_cutoff",
                                        "top_h",
                                        "no_repeat_ngram_size",
                                        "encoder_repetition_penalty",
                                        "penalty_alpha",
                                        "num_beams",
                                        "sequence_bias",
                                        "suppress_tokens",
                                        "begin_suppress_tokens",
                                        "bad_words_ids",
                                        "stop_strings"};

}  // namespace

std::optional<double> GenerationConfig::effective_temperature() const {
  if (do_sample == false) return 0;
  if (do_sample == true) return temperature.value_or(1);
  return temperature;
}

GenerationConfig read_generation_config(const std::filesystem::path& folder) {
  GenerationConfig config;
  const std::filesystem::path path = folder / kFile;
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return config;
  const std::string file = path.string();
  const nlohmann::json object = parse_json(read_text(path, kMaxBytes), file);
  const JsonFields fields(object, file);
  const auto number = [&fields](const char* key) {
    return fields.find(key) ? std::optional<double>(fields.number(key)) : std::nullopt;
  };
  config.temperature = number("temperature");
  config.top_p = number("top_p");
  config.min_p = number("min_p");
  config.repetition_penalty = number("repetition_penalty");
  if (fields.find("top_k")) config.top_k = fields.integer("top_k");
  if (fields.find("do_sample")) config.do_sample = fields.boolean("do_sample", false);
  if (const nlohmann::json* eos = fields.find("eos_token_id")) {
    for (const nlohmann::json& id : eos->is_array() ? *eos : nlohmann::json::array({*eos})) {
      config.eos_token_ids.push_back(fields.as_integer("eos_token_id", id));
    }
  }
  for (const char* key : kUnsupported) {
    const nlohmann::json* value = fields.find(key);
    if (value && *value != false && *value != 0 && *value != 1) config.unsupported.push_back(key);
  }
  return config;
}

void add_stop_ids(const GenerationConfig& generation, Config& config, const Warn& warn) {
  std::vector<int64_t>& ids = config.eos_token_ids;
  for (const int64_t id : generation.eos_token_ids) {
    const bool is_token = 0 <= id && id < config.vocab_size;
    if (is_token && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
    if (!is_token && warn) {
      warn(std::string(kFile) + ": eos_token_id: " + std::to_string(id) + " is not in the vocabulary of " +
           std::to_string(config.vocab_size) + " and is left out");
    }
  }
}

}  // namespace mixtral
