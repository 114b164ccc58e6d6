// The longest of many strings that a text starts with.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mixtral {

class PrefixMatcher {
 public:
  struct Entry {
    std::string text;
    int64_t value;
  };
  struct Match {
    size_t length = 0;  // 0: none
    int64_t value = -1;
  };

  PrefixMatcher() = default;
  explicit PrefixMatcher(std::vector<Entry> entries);  // empty strings are left out

  Match longest(std::string_view text) const;
  bool empty() const { return entries_.empty(); }

 private:
  std::vector<Entry> entries_;                         // sorted by bytes
  std::array<std::pair<size_t, size_t>, 256> starts_;  // the entries that start with a byte
};

}  // namespace mixtral
