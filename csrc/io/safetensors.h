// Reader of the safetensors format (https://github.com/huggingface/safetensors): u64 little-endian header length, JSON
// header, data. The header is validated whole before anything is allocated for the data. No torch in here.
#pragma once

#include <filesystem>

#include "tensor_file.h"

namespace mixtral {

// Throws LoadError when the file is not a regular file or its header breaks a rule of the format.
TensorFile open_safetensors(const std::filesystem::path& path);

}  // namespace mixtral
