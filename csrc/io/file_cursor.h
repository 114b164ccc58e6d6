// Numbers and texts of an untrusted binary file from front to back, through a small buffer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "file.h"
#include "load_error.h"

namespace mixtral {

class FileCursor {
 public:
  explicit FileCursor(const File& file) : file_(file) {}

  uint64_t position() const { return position_; }

  template <typename T>
  T number() {
    T value;
    read(&value, sizeof value);
    return value;
  }

  // A text behind its length in 64 bits.
  std::string text(uint64_t max_bytes) {
    const auto bytes = number<uint64_t>();
    if (bytes > max_bytes) fail("a text must have at most " + std::to_string(max_bytes) + " bytes");
    if ((all_text_ += bytes) > kMaxAllTextBytes) fail("all texts must have at most 32 MiB");
    if (bytes > file_.size() - position_) fail("ends within its header");
    std::string text(bytes, '\0');
    read(text.data(), bytes);
    return text;
  }

  void skip(uint64_t bytes) {
    if (bytes > file_.size() - position_) fail("ends within its header");
    position_ += bytes;
  }

  [[noreturn]] void fail(const std::string& reason) const { throw LoadError(file_.path(), "", reason); }

 private:
  static constexpr uint64_t kMaxAllTextBytes = 32 << 20;

  void read(void* out, uint64_t bytes) {
    const uint64_t from = position_;
    skip(bytes);
    if (bytes > sizeof buffer_) return file_.read(from, out, bytes);
    if (from < begin_ || position_ > end_) {
      begin_ = from;
      end_ = from + std::min<uint64_t>(sizeof buffer_, file_.size() - from);
      file_.read(begin_, buffer_, end_ - begin_);
    }
    if (bytes > 0) std::memcpy(out, buffer_ + (from - begin_), bytes);
  }

  const File& file_;
  uint64_t position_ = 0, all_text_ = 0;
  uint64_t begin_ = 0, end_ = 0;  // what the buffer holds
  char buffer_[1 << 14];
};

}  // namespace mixtral
