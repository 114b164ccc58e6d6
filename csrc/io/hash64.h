// A number that tells data apart, by accident and not against an attacker.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace mixtral {

// FNV-1a (Fowler, Noll, Vo), 64 bits.
class Hash64 {
 public:
  void add(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) value_ = (value_ ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3;
  }
  void add(const std::string& text) { add(text.data(), text.size()); }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325;
};

}  // namespace mixtral
