// generation_config.json beside a checkpoint: where generation ends, and how its author samples.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "../model/config.h"
#include "load_options.h"

namespace mixtral {

struct GenerationConfig {
  std::vector<int64_t> eos_token_ids;
  // Sampling; none: the file does not say.
  std::optional<bool> do_sample;
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::optional<int64_t> top_k;
  std::vector<std::string> unsupported;  // keys for other ways of generating, which this engine does not have

  // With do_sample false it is 0, with do_sample true at least 1 where the file names none.
  std::optional<double> effective_temperature() const;
};

// All empty where the folder has no such file. Throws LoadError.
GenerationConfig read_generation_config(const std::filesystem::path& folder);

// Adds the stop ids of generation_config.json to the configuration's own, but for those that no token can have.
void add_stop_ids(const GenerationConfig& generation, Config& config, const Warn& warn);

}  // namespace mixtral
