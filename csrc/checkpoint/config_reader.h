// Config from config.json (transformers v4 and v5 spelling) and from params.json (Mistral's consolidated checkpoints).
#pragma once

#include <filesystem>
#include <string>

#include "../model/config.h"
#include "load_options.h"

namespace mixtral {

// Reads config.json or params.json from `folder`, corrected by the weight files if they are there (contents.h). Throws
// LoadError naming the field.
Config read_config(const std::filesystem::path& folder, const Warn& warn = nullptr);

// The text of a config.json or params.json. `source` is the file that errors and warnings name.
Config parse_config(const std::string& text, CheckpointLayout layout, const std::string& source,
                    const Warn& warn = nullptr);

}  // namespace mixtral
