// Bytes of binary files, written by hand.
#pragma once

#include <cstring>
#include <string>

namespace mixtral::testing {

template <typename T>
std::string bytes_of(T number) {
  std::string bytes(sizeof number, '\0');
  std::memcpy(bytes.data(), &number, sizeof number);
  return bytes;
}

// The first occurrence of `from` in `text` replaced by `to`.
inline std::string replaced(std::string text, const std::string& from, const std::string& to) {
  return text.replace(text.find(from), from.size(), to);
}

}  // namespace mixtral::testing
