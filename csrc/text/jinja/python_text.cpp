#include "python_text.h"

#include "../../io/utf8.h"

namespace mixtral::jinja {
namespace {

size_t first_length(std::string_view text) {
  const Utf8Prefix prefix = utf8_prefix(text);
  return prefix.kind == Utf8Prefix::kWhole ? prefix.length : 1;
}

// Length of the last code point.
size_t last_length(std::string_view text) {
  for (size_t length = 1; length <= 4 && length <= text.size(); ++length) {
    const Utf8Prefix prefix = utf8_prefix(text.substr(text.size() - length));
    if (prefix.kind == Utf8Prefix::kWhole && prefix.length == length) return length;
  }
  return 1;
}

uint32_t code_point(std::string_view character) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(character[i]); };
  if (character.size() == 1) return byte(0) < 0x80 ? byte(0) : 0xFFFFFFFF;
  uint32_t code = byte(0) & (0xFF >> (character.size() + 1));
  for (size_t i = 1; i < character.size(); ++i) code = code << 6 | (byte(i) & 0x3F);
  return code;
}

bool is_space(std::string_view character) {
  const uint32_t c = code_point(character);
  return (0x09 <= c && c <= 0x0D) || (0x1C <= c && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (0x2000 <= c && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

}  // namespace

bool starts_with_space(std::string_view text) { return !text.empty() && is_space(text.substr(0, first_length(text))); }

std::string_view strip(std::string_view text, bool left, bool right, std::optional<std::string_view> of) {
  const auto goes = [&](std::string_view c) { return of ? of->find(c) != of->npos : is_space(c); };
  while (left && !text.empty() && goes(text.substr(0, first_length(text)))) text.remove_prefix(first_length(text));
  while (right && !text.empty() && goes(text.substr(text.size() - last_length(text)))) {
    text.remove_suffix(last_length(text));
  }
  return text;
}

std::vector<std::string_view> characters(std::string_view text) {
  std::vector<std::string_view> all;
  while (!text.empty()) {
    const size_t length = first_length(text);
    all.push_back(text.substr(0, length));
    text.remove_prefix(length);
  }
  return all;
}

std::vector<std::string_view> split(std::string_view text, std::optional<std::string_view> separator, int64_t limit) {
  std::vector<std::string_view> parts;
  const auto full = [&] { return limit >= 0 && static_cast<int64_t>(parts.size()) >= limit; };
  if (!separator) {
    for (text = strip(text, true, false); !text.empty(); text = strip(text, true, false)) {
      if (full()) {
        parts.push_back(text);
        break;
      }
      size_t end = 0;
      while (end < text.size() && !starts_with_space(text.substr(end))) end += first_length(text.substr(end));
      parts.push_back(text.substr(0, end));
      text.remove_prefix(end);
    }
    return parts;
  }
  for (size_t found; !full() && (found = text.find(*separator)) != text.npos;) {
    parts.push_back(text.substr(0, found));
    text.remove_prefix(found + separator->size());
  }
  parts.push_back(text);
  return parts;
}

}  // namespace mixtral::jinja
