// The prompts of passkey retrieval: a number hidden in a text of a known length, at a known depth, and asked for at the
// end. Lengths and depths are counted in tokens.
//
// Styles: `landmark`, the prompt of Mohtashami and Jaggi (Landmark Attention, 2023); `ruler`, the task niah_single_1 of
// RULER (Hsieh et al., 2024).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../text/tokenizer.h"

namespace mixtral {

enum class PasskeyStyle { kLandmark, kRuler };
PasskeyStyle parse_passkey_style(const std::string& name);  // throws std::invalid_argument

struct PasskeyPrompt {
  std::vector<int64_t> ids;     // [length], BOS included
  std::vector<int64_t> answer;  // what is to follow: the key's digits, and what the tokenizer puts before them
  int64_t needle = 0;           // where the sentences with the key begin
  int64_t distance = 0;         // tokens from the last digit of the key to the last token of the prompt
};

// A prompt of exactly `length` tokens. Of its filler, the share `depth` in [0, 1] stands before the needle, rounded to
// whole tokens. `name` is what the number is called in the style `ruler`, one of passkey_names(). Throws
// std::invalid_argument when the length has no room for the parts that are not filler.
PasskeyPrompt passkey_prompt(const Tokenizer& tokenizer, PasskeyStyle style, int64_t length, double depth,
                             const std::string& key, const std::string& name);
const std::vector<std::string>& passkey_names();

// The length that has room for any name and for a key of so many digits.
int64_t shortest_passkey_prompt(const Tokenizer& tokenizer, PasskeyStyle style, int64_t digits);

// Whether an answer has the key. landmark: the first run of digits is the key, with its leading zeros; ruler: the key
// occurs in the answer.
bool passkey_found(PasskeyStyle style, const std::string& answer, const std::string& key);

// Whether a token holds a digit.
bool has_digit(const Tokenizer& tokenizer, int64_t id);

}  // namespace mixtral
