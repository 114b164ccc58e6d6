// Little-endian numbers and byte strings from a buffer of untrusted bytes, one after the other.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "load_error.h"

namespace mixtral {

class ByteReader {
 public:
  // `file` and `item` are what errors name; both must outlive the reader, as `bytes` must.
  ByteReader(std::string_view bytes, const std::string& file, const std::string& item)
      : bytes_(bytes), file_(file), item_(item) {}

  size_t position() const { return position_; }
  bool at_end() const { return position_ == bytes_.size(); }

  // Throws LoadError when fewer than `size` bytes are left.
  std::string_view take(uint64_t size) {
    if (size > bytes_.size() - position_) fail("ends early");
    const std::string_view taken = bytes_.substr(position_, size);
    position_ += size;
    return taken;
  }

  // An integer or float type of this machine, which is little-endian.
  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }

  [[noreturn]] void fail(const std::string& reason) const { throw LoadError(file_, item_, reason); }

 private:
  const std::string_view bytes_;
  size_t position_ = 0;
  const std::string& file_;
  const std::string& item_;
};

}  // namespace mixtral
