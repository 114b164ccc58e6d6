#include "generation_config.h"

#include <algorithm>
#include <type_traits>

#include "../io/file.h"
#include "../io/json.h"
#include "../io/load_error.h"

namespace mixtral {
namespace {

using nlohmann::json;

constexpr const char* kFile = "generation_config.json";
constexpr uint64_t kMaxBytes = 1 << 20;

// A key whose value is null counts as absent.
const json* find(const json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

template <typename T>
bool fits(const json& value) {
  if (std::is_same_v<T, bool>) return value.is_boolean();
  if (std::is_same_v<T, double>) return value.is_number();
  return value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX});
}

template <typename T>
T get(const json& value, const char* key, const std::string& file, const char* kind) {
  if (!fits<T>(value)) throw LoadError(file, key, std::string("must be ") + kind + ", got " + shown(value));
  return value.get<T>();
}

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
  const json object = parse_json(read_text(path, kMaxBytes), file);
  const auto number = [&](const char* key, std::optional<double>& field) {
    if (const json* value = find(object, key)) field = get<double>(*value, key, file, "a number");
  };
  number("temperature", config.temperature);
  number("top_p", config.top_p);
  number("min_p", config.min_p);
  number("repetition_penalty", config.repetition_penalty);
  if (const json* value = find(object, "top_k")) config.top_k = get<int64_t>(*value, "top_k", file, "an integer");
  if (const json* value = find(object, "do_sample")) {
    config.do_sample = get<bool>(*value, "do_sample", file, "true or false");
  }
  if (const json* eos = find(object, "eos_token_id")) {
    for (const json& id : eos->is_array() ? *eos : json::array({*eos})) {
      config.eos_token_ids.push_back(get<int64_t>(id, "eos_token_id", file, "token ids"));
    }
  }
  for (const char* key : {"typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "no_repeat_ngram_size",
                          "encoder_repetition_penalty", "penalty_alpha", "num_beams", "sequence_bias",
                          "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop_strings"}) {
    const json* value = find(object, key);
    if (value && *value != 0 && *value != 1) config.unsupported.push_back(key);
  }
  return config;
}

void add_stop_ids(const GenerationConfig& generation, Config& config) {
  std::vector<int64_t>& ids = config.eos_token_ids;
  for (const int64_t id : generation.eos_token_ids) {
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
}

void drop_unknown_stop_ids(Config& config) {
  std::vector<int64_t>& ids = config.eos_token_ids;
  const auto unknown =
      std::stable_partition(ids.begin(), ids.end(), [&](int64_t id) { return 0 <= id && id < config.vocab_size; });
  for (auto id = unknown; id != ids.end(); ++id) {
    const std::string text = "eos_token_id " + std::to_string(*id) + " is outside the vocabulary of " +
                             std::to_string(config.vocab_size) + " tokens: it ends nothing";
    if (config.note.find(text) == std::string::npos) config.note += (config.note.empty() ? "" : "; ") + text;
  }
  ids.erase(unknown, ids.end());
}

}  // namespace mixtral
