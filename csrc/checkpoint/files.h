// From a checkpoint folder to its open weight files.
#pragma once

#include <filesystem>
#include <vector>

#include "../io/tensor_file.h"
#include "../model/config.h"

namespace mixtral {

// One file, or shards with an index. Throws LoadError.
std::vector<TensorFile> open_files(const std::filesystem::path& folder, CheckpointLayout layout);

}  // namespace mixtral
