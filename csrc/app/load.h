// From flags to a loaded model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

#include "../engine/engine.h"
#include "../model/config.h"
#include "../model/weight_type.h"
#include "../text/tokenizer.h"
#include "flags.h"

namespace mixtral::app {

// The folder that MODEL means (checkpoint/folder.h), or the demo model's.
std::filesystem::path model_path(const ModelFlags& flags);
// One line on stderr; the same message once.
void warn(const std::string& message);
// The model's; warns where its files disagree.
Tokenizer load_tokenizer(const ModelFlags& flags);
WeightType weight_type_of(const ModelFlags& flags, const Config& config);
int64_t context_of(const ModelFlags& flags, const Config& config);

struct LoadedEngine {
  Engine engine;
  double seconds;  // it took to load
};
// Reads the weights, with a progress bar on a terminal when that takes long. Chunk and context size come from `flags`.
LoadedEngine load_engine(const ModelFlags& flags, std::optional<Tokenizer> tokenizer, Engine::Options options = {});

}  // namespace mixtral::app
