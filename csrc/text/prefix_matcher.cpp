#include "prefix_matcher.h"

#include <algorithm>

namespace mixtral {
namespace {

unsigned char byte_of(const std::string& text, size_t i) { return static_cast<unsigned char>(text[i]); }

}  // namespace

PrefixMatcher::PrefixMatcher(std::vector<Entry> entries) : entries_(std::move(entries)), starts_{} {
  entries_.erase(std::remove_if(entries_.begin(), entries_.end(), [](const Entry& e) { return e.text.empty(); }),
                 entries_.end());
  // std::string compares bytes as unsigned.
  std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.text < b.text; });
  for (size_t i = 0; i < entries_.size(); ++i) {
    auto& [begin, end] = starts_[byte_of(entries_[i].text, 0)];
    if (begin == end) begin = i;
    end = i + 1;
  }
}

PrefixMatcher::Match PrefixMatcher::longest(std::string_view text) const {
  Match match;
  if (entries_.empty() || text.empty()) return match;
  auto [begin, end] = starts_[static_cast<unsigned char>(text[0])];
  // entries_[begin, end) agree with the first `depth` bytes of the text; one of just these bytes comes first.
  for (size_t depth = 1; begin < end; ++depth) {
    if (entries_[begin].text.size() == depth) {
      match = {depth, entries_[begin].value};
      ++begin;
    }
    if (depth == text.size()) break;
    if (begin + 1 == end) {  // byte by byte, a long entry would take long at every place of a text
      const std::string& last = entries_[begin].text;
      if (text.substr(0, last.size()) == last) match = {last.size(), entries_[begin].value};
      break;
    }
    const auto byte = static_cast<unsigned char>(text[depth]);
    const auto from = entries_.begin();
    const auto low = std::lower_bound(from + begin, from + end, byte,
                                      [&](const Entry& e, unsigned char b) { return byte_of(e.text, depth) < b; });
    const auto high = std::upper_bound(low, from + end, byte,
                                       [&](unsigned char b, const Entry& e) { return b < byte_of(e.text, depth); });
    begin = static_cast<size_t>(low - from);
    end = static_cast<size_t>(high - from);
  }
  return match;
}

}  // namespace mixtral
