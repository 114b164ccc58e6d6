// How fast a disk is. No torch in here.
#pragma once

#include <filesystem>

namespace mixtral {

// Bytes per second that come from the disk when up to 256 MiB of the file are read past the memory of the system. 0
// where the file is missing or shorter than 16 MiB, or its file system cannot do that.
double disk_bandwidth(const std::filesystem::path& file);

}  // namespace mixtral
