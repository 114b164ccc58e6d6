// From a checkpoint folder to its open weight files.
#pragma once

#include <filesystem>
#include <vector>

#include "../io/tensor_file.h"
#include "../model/config.h"
#include "load_options.h"

namespace mixtral {

// One file, shards with an index, or all shards without one. Names come without the prefixes of training wrappers, such
// as "module." or "_orig_mod.". `warn` hears where the index and the files disagree, and which of two sets of files is
// read. Throws LoadError.
std::vector<TensorFile> open_files(const std::filesystem::path& folder, CheckpointLayout layout,
                                   const Warn& warn = nullptr);

}  // namespace mixtral
