// Tokens that were added to a vocabulary: each is found in a text as a whole, before the rest is merged from
// characters.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "prefix_matcher.h"

namespace mixtral {

struct AddedToken {
  int64_t id = -1;
  std::string text;
  bool special = false;      // found only where asked for
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
  bool single_word = false;  // not next to a letter, a digit or "_"
  bool normalized = false;   // found in the text as the vocabulary spells it
};

// A part of a text: one added token, or (id < 0) other text.
struct TextPart {
  std::string_view text;
  int64_t id = -1;
};

// Finds tokens from left to right, the longest first. `spellings` replaces the tokens' texts.
class AddedTokenFinder {
 public:
  AddedTokenFinder() = default;
  AddedTokenFinder(const std::vector<AddedToken>& tokens, const std::vector<std::string>& spellings);

  std::vector<TextPart> split(std::string_view text, bool parse_special) const;
  // The special tokens in the text, each once.
  std::vector<int64_t> special_in(std::string_view text) const;

 private:
  std::vector<AddedToken> tokens_;
  PrefixMatcher matcher_;  // to indices of `tokens_`
};

}  // namespace mixtral
