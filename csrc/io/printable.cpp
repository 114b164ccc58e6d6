#include "printable.h"

#include <cstdint>
#include <cstdio>

#include "utf8.h"

namespace mixtral {
namespace {

bool is_unsafe(uint32_t c) {
  const auto within = [c](uint32_t low, uint32_t high) { return low <= c && c <= high; };
  return c < 0x20 || within(0x7F, 0x9F) || c == 0xAD || c == 0x61C || c == 0x180E || within(0x200B, 0x200F) ||
         within(0x2028, 0x202E) || within(0x2060, 0x206F) || c == 0xFEFF || within(0xFFF9, 0xFFFB);
}

}  // namespace

std::string printable(std::string_view text, size_t max_bytes) {
  std::string out;
  while (!text.empty()) {
    if (out.size() >= max_bytes) return out + "...";
    const Utf8Prefix prefix = utf8_prefix(text);
    const bool whole = prefix.kind == Utf8Prefix::kWhole;
    const std::string_view bytes = text.substr(0, whole ? prefix.length : 1);
    const uint32_t c = whole ? code_point(bytes) : static_cast<unsigned char>(bytes[0]);
    if (whole && !is_unsafe(c)) {
      out += bytes;
    } else {
      char escape[8];
      std::snprintf(escape, sizeof escape, whole ? "\\u%04x" : "\\x%02x", c & 0xFFFF);
      out += escape;
    }
    text.remove_prefix(bytes.size());
  }
  return out;
}

}  // namespace mixtral
