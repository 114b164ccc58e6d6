#include "added_tokens.h"

#include <algorithm>

#include "../io/utf8.h"

namespace mixtral {
namespace {

// The code point that starts at `text`; -1 for bytes that are none.
int32_t first_code_point(std::string_view text) {
  const bool whole = !text.empty() && utf8_prefix(text).kind == Utf8Prefix::kWhole;
  return whole ? static_cast<int32_t>(code_point(text)) : -1;
}

// Where the last code point of the text begins.
size_t last_begin(std::string_view text) {
  size_t begin = text.size() - 1;
  while (begin > 0 && text.size() - begin < 4 && (text[begin] & 0xC0) == 0x80) --begin;
  return begin;
}

bool within(int32_t c, int32_t low, int32_t high) { return low <= c && c <= high; }

bool is_space(int32_t c) {  // White_Space of Unicode
  return within(c, 0x09, 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || within(c, 0x2000, 0x200A) ||
         within(c, 0x2028, 0x2029) || c == 0x202F || c == 0x205F || c == 0x3000;
}

// Letters, digits, marks and "_". Exact in ASCII; beyond it, everything but spaces and the blocks of signs.
bool is_word(int32_t c) {
  if (c < 0x80) return within(c, '0', '9') || within(c, 'A', 'Z') || within(c, 'a', 'z') || c == '_';
  if (is_space(c) || within(c, 0x80, 0xA9) || within(c, 0xAB, 0xB4) || within(c, 0xB6, 0xB9) || within(c, 0xBB, 0xBF)) {
    return false;
  }
  if (c == 0xD7 || c == 0xF7) return false;
  if (within(c, 0x2010, 0x206F)) return c == 0x203F || c == 0x2040 || c == 0x2054;
  const bool signs = within(c, 0x20A0, 0x20CF) || within(c, 0x2190, 0x24B5) || within(c, 0x24EA, 0x2BFF) ||
                     within(c, 0x2E00, 0x2E2E) || within(c, 0x3001, 0x3004) || within(c, 0x3008, 0x3020) ||
                     within(c, 0xFE10, 0xFE1F) || within(c, 0xFF01, 0xFF0F) || within(c, 0xFF1A, 0xFF20) ||
                     within(c, 0xE000, 0xF8FF) || within(c, 0xFFF0, 0xFFFF) || within(c, 0x1F000, 0x1F12F) ||
                     within(c, 0x1F18A, 0x1FAFF) || (c >= 0x323B0 && !within(c, 0xE0100, 0xE01EF));
  return !signs;
}

bool ends_in_word(std::string_view text) {
  return !text.empty() && is_word(first_code_point(text.substr(last_begin(text))));
}
bool starts_with_word(std::string_view text) { return is_word(first_code_point(text)); }

size_t spaces_at_end(std::string_view text) {
  std::string_view rest = text;
  while (!rest.empty() && is_space(first_code_point(rest.substr(last_begin(rest)))))
    rest = rest.substr(0, last_begin(rest));
  return text.size() - rest.size();
}

size_t spaces_at_start(std::string_view text) {
  size_t size = 0;
  while (is_space(first_code_point(text.substr(size)))) size += utf8_prefix(text.substr(size)).length;
  return size;
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(const std::vector<AddedToken>& tokens, const std::vector<std::string>& spellings)
    : tokens_(tokens) {
  std::vector<PrefixMatcher::Entry> entries;
  for (size_t i = 0; i < tokens.size(); ++i) entries.push_back({spellings[i], static_cast<int64_t>(i)});
  matcher_ = PrefixMatcher(std::move(entries));
}

std::vector<TextPart> AddedTokenFinder::split(std::string_view text, bool parse_special) const {
  std::vector<TextPart> parts;
  size_t done = 0;      // text before this place is in `parts`
  size_t stripped = 0;  // the end of the spaces that were taken last
  for (size_t at = 0; at < text.size() && !matcher_.empty();) {
    const PrefixMatcher::Match match = matcher_.longest(text.substr(at));
    if (match.length == 0) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + match.length;
    at = end;
    const AddedToken& token = tokens_[static_cast<size_t>(match.value)];
    if (token.special && !parse_special) continue;
    if (token.single_word && (ends_in_word(text.substr(0, begin)) || starts_with_word(text.substr(end)))) continue;
    if (token.lstrip && done < begin) begin -= spaces_at_end(text.substr(done, begin - done));
    // Where each of many spaces is such a token, none is looked at twice.
    if (token.rstrip) end = stripped = end <= stripped ? stripped : end + spaces_at_start(text.substr(end));
    if (done < begin) parts.push_back({text.substr(done, begin - done)});
    parts.push_back({text.substr(begin, end - begin), token.id});
    done = std::max(done, end);
  }
  if (done < text.size()) parts.push_back({text.substr(done)});
  return parts;
}

std::vector<int64_t> AddedTokenFinder::special_in(std::string_view text) const {
  std::vector<int64_t> ids;
  for (size_t at = 0; at < text.size() && !matcher_.empty();) {
    const PrefixMatcher::Match match = matcher_.longest(text.substr(at));
    at += std::max<size_t>(match.length, 1);
    if (match.length == 0 || !tokens_[static_cast<size_t>(match.value)].special) continue;
    const int64_t id = tokens_[static_cast<size_t>(match.value)].id;
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  return ids;
}

}  // namespace mixtral
