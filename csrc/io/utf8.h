// Well-formed UTF-8 (the Unicode Standard, table 3-7): no overlong forms, no surrogates, nothing past U+10FFFF.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>

namespace mixtral {

// How a byte string starts: with a whole code point, with the beginning of one, or with a byte that belongs to none.
struct Utf8Prefix {
  enum Kind { kWhole, kCut, kInvalid } kind;
  size_t length;  // in bytes; 1 for kInvalid
};

// `text` must not be empty.
inline Utf8Prefix utf8_prefix(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {Utf8Prefix::kWhole, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Utf8Prefix::kInvalid, 1};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  for (size_t i = 1; i < std::min(length, text.size()); ++i) {
    // The second byte shows overlong forms (E0, F0), surrogates (ED) and values past U+10FFFF (F4).
    const bool second = i == 1;
    const unsigned char low = second && lead == 0xE0 ? 0xA0 : second && lead == 0xF0 ? 0x90 : 0x80;
    const unsigned char high = second && lead == 0xED ? 0x9F : second && lead == 0xF4 ? 0x8F : 0xBF;
    if (byte(i) < low || byte(i) > high) return {Utf8Prefix::kInvalid, 1};
  }
  if (text.size() < length) return {Utf8Prefix::kCut, text.size()};
  return {Utf8Prefix::kWhole, length};
}

// The value of the whole code point that `text` starts with.
inline uint32_t code_point(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  const size_t length = utf8_prefix(text).length;
  uint32_t value = length == 1 ? lead : lead & (0x7FU >> length);
  for (size_t i = 1; i < length; ++i) value = value << 6 | (static_cast<unsigned char>(text[i]) & 0x3FU);
  return value;
}

inline bool is_valid_utf8(std::string_view text) {
  while (!text.empty()) {
    const Utf8Prefix prefix = utf8_prefix(text);
    if (prefix.kind != Utf8Prefix::kWhole) return false;
    text.remove_prefix(prefix.length);
  }
  return true;
}

}  // namespace mixtral
