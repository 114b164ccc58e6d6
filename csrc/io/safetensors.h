// Reader of the safetensors format (https://github.com/huggingface/safetensors): u64 little-endian header length, JSON
// header, data. The header is validated whole before anything is allocated for the data. No torch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "file.h"

namespace mixtral {

struct SafetensorsEntry {
  std::string dtype;  // "F32", "BF16", "F16", ...
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // byte range in the file
};

class SafetensorsFile {
 public:
  // Throws LoadError when the file is not a regular file or its header breaks a rule of the format.
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::string& path() const { return file_.path(); }
  const std::map<std::string, SafetensorsEntry>& entries() const { return entries_; }

  // Reads `bytes` bytes from absolute `offset`. Throws LoadError when the file has become shorter.
  void read(uint64_t offset, void* out, uint64_t bytes) const { file_.read(offset, out, bytes); }

 private:
  File file_;
  std::map<std::string, SafetensorsEntry> entries_;
};

}  // namespace mixtral
