// What a file is that is not what its name says.
#pragma once

#include "file.h"

namespace mixtral {

// Throws LoadError, with what to do, when the first bytes are those of a git-lfs pointer, a web page, a GGUF file, a
// zip archive or a Python pickle, or when there are none.
void check_kind(const File& file);

}  // namespace mixtral
