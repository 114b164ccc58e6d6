// A trace in a file: docs/routing.md, "The trace file".
#pragma once

#include <filesystem>

#include "trace.h"

namespace mixtral {

// Replaces the file, or leaves it as it was. Throws std::runtime_error when it cannot be written.
void write_trace(const Trace& trace, const std::filesystem::path& path);
// Throws LoadError when the file is cut short, no trace, or one whose parts do not fit each other.
Trace read_trace(const std::filesystem::path& path);

}  // namespace mixtral
