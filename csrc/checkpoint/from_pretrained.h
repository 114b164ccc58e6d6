// From a folder to a model.
#pragma once

#include <filesystem>

#include "load_options.h"

namespace mixtral {

class Mixtral;

// Throws std::invalid_argument for options that exclude one another, as from_pretrained does.
void check_options(const LoadOptions& options);

// A Hugging Face or Mistral consolidated folder, or one that save.h wrote; of it what options.placement says. Throws
// LoadError; std::invalid_argument for a dtype or a placement that does not fit, or weights that cannot be mapped;
// OutOfMemory before anything is allocated, and where the system does not let mlock be done; std::runtime_error for a
// CUDA device that is not there.
Mixtral from_pretrained(const std::filesystem::path& folder, const LoadOptions& options = {});

}  // namespace mixtral
