#include "load_error.h"

#include <cstdio>

namespace mixtral {
namespace {

std::string escaped(const std::string& text) {
  constexpr size_t kMaxBytes = 256;
  std::string out;
  for (const unsigned char c : text.substr(0, kMaxBytes)) {
    if (c >= 0x20 && c != 0x7f) {
      out += static_cast<char>(c);
    } else {
      char buffer[5];
      std::snprintf(buffer, sizeof buffer, "\\x%02x", c);
      out += buffer;
    }
  }
  return text.size() > kMaxBytes ? out + "..." : out;
}

std::string one_line(const std::string& file, const std::string& item, const std::string& reason) {
  return escaped(file) + ": " + (item.empty() ? "" : escaped(item) + ": ") + reason;
}

}  // namespace

LoadError::LoadError(std::string file, std::string item, std::string reason)
    : std::runtime_error(one_line(file, item, reason)),
      file_(std::move(file)),
      item_(std::move(item)),
      reason_(std::move(reason)) {}

}  // namespace mixtral
