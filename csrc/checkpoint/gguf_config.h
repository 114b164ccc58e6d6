// Config from the metadata of a GGUF file of the Mistral family, whose architecture is called "llama" there.
#pragma once

#include <filesystem>

#include "../model/config.h"

namespace mixtral {

// Reads the header of the file alone. Throws LoadError naming the key.
Config read_gguf_config(const std::filesystem::path& path);

}  // namespace mixtral
