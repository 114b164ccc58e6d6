// Reader of zip archives whose members are stored without compression, as torch.save writes them, zip64 included.
// Checksums are not compared: no other weight file has any. No torch in here.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "file.h"

namespace mixtral {

struct ZipMember {
  uint64_t begin = 0, end = 0;  // byte range of its contents in the file
};

// By name. Throws LoadError when the archive breaks a rule of the format, or a member is compressed or encrypted.
std::map<std::string, ZipMember> read_zip_directory(const File& file);

}  // namespace mixtral
