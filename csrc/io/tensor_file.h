// A file of named tensors, whatever its format: what it holds, where each tensor's bytes lie, and a way to read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "file.h"
#include "load_error.h"

namespace mixtral {

// Files with more are refused.
inline constexpr size_t kMaxTensors = 65536;
inline constexpr size_t kMaxTensorRank = 8;

struct TensorEntry {
  std::string dtype;  // in safetensors' words: "F32", "BF16", "F16", ...
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // byte range in the file
};

class TensorFile {
 public:
  TensorFile(File file, std::map<std::string, TensorEntry> entries, std::map<std::string, std::string> metadata = {})
      : file_(std::move(file)), entries_(std::move(entries)), metadata_(std::move(metadata)) {}

  const std::string& path() const { return file_.path(); }
  const File& file() const { return file_; }
  const std::map<std::string, TensorEntry>& entries() const { return entries_; }
  // Of a safetensors file.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // Gives every tensor the name that `to_new` makes of its own. Throws LoadError when two would have the same.
  template <typename F>
  void rename(F to_new) {
    std::map<std::string, TensorEntry> renamed;
    for (auto& [name, entry] : entries_) {
      if (!renamed.emplace(to_new(name), entry).second)
        throw LoadError(path(), name, "occurs twice, under two prefixes");
    }
    entries_ = std::move(renamed);
  }

  // Reads `bytes` bytes from absolute `offset`. Throws LoadError when the file has become shorter.
  void read(uint64_t offset, void* out, uint64_t bytes) const { file_.read(offset, out, bytes); }
  bool read_directly() { return file_.read_directly(); }  // as of File

 private:
  File file_;
  std::map<std::string, TensorEntry> entries_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace mixtral
