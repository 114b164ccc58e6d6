// Where a model is: a folder, or a name in the local Hugging Face cache.
#pragma once

#include <filesystem>
#include <string>

#include "../model/config.h"
#include "load_options.h"

namespace mixtral {

// The folder that `model` means: a folder; "~/..."; the root of a cached repository ("models--org--name"), whose
// revision "main" is taken; or a repository "org/name" in the cache, which is where HF_HUB_CACHE or HF_HOME say, or
// ~/.cache/huggingface/hub. Nothing is downloaded. Throws LoadError.
std::filesystem::path find_model(const std::filesystem::path& model);

// Whether there are weight files of this layout.
bool has_weights(const std::filesystem::path& folder, CheckpointLayout layout);

// A folder may hold both layouts, as Mistral's own repositories do: the one whose weights are there, config.json first,
// which `warn` hears. Throws LoadError when neither is there.
CheckpointLayout layout_of(const std::filesystem::path& folder, const Warn& warn = nullptr);

}  // namespace mixtral
