// Config from config.json (transformers v4 and v5 spelling) and from params.json (Mistral's consolidated checkpoints).
#pragma once

#include <filesystem>
#include <string>

#include "../model/config.h"

namespace mixtral {

// Reads config.json or params.json from `folder`. Throws LoadError naming the field.
Config read_config(const std::filesystem::path& folder);

// The text of a config.json or params.json. `source` is the file that errors name.
Config parse_config(const std::string& text, CheckpointLayout layout, const std::string& source);

}  // namespace mixtral
