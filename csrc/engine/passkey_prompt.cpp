#include "passkey_prompt.h"

#include <algorithm>
#include <cmath>

#include "require.h"

namespace mixtral {
namespace {

const std::string kFiller =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ";

// The answer follows `question` and a space.
struct Sentences {
  std::string intro, needle, question;
};

Sentences sentences(PasskeyStyle style, const std::string& key, const std::string& name) {
  if (style == PasskeyStyle::kLandmark) {
    return {
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz "
        "you about the important information there.",
        "The pass key is " + key + ". Remember it. " + key + " is the pass key.",
        "What is the pass key? The pass key is"};
  }
  return {
      "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
      "the number afterwards.",
      "One of the special magic numbers for " + name + " is: " + key + ".",
      "What is the special magic number for " + name +
          " mentioned in the provided text? The special magic number for " + name +
          " mentioned in the provided text is"};
}

// Where two lists begin to differ.
int64_t common_prefix(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  size_t i = 0;
  while (i < a.size() && i < b.size() && a[i] == b[i]) ++i;
  return static_cast<int64_t>(i);
}

// The first `count` tokens of filler, over and over.
std::vector<int64_t> filler(const Tokenizer& tokenizer, int64_t count) {
  std::string text;
  std::vector<int64_t> ids;
  while (static_cast<int64_t>(ids.size()) < count) {
    text += text.empty() ? kFiller : text;
    ids = tokenizer.encode(text);
  }
  ids.resize(static_cast<size_t>(count));
  return ids;
}

// What of a prompt is not filler: BOS and the intro, a new line behind the filler on both sides of the needle, the
// needle, the question.
struct Parts {
  std::vector<int64_t> intro, newline, needle, question, answer;

  int64_t tokens() const {
    return static_cast<int64_t>(intro.size() + 2 * newline.size() + needle.size() + question.size());
  }
};

Parts parts_of(const Tokenizer& tokenizer, PasskeyStyle style, const std::string& key, const std::string& name) {
  const Sentences text = sentences(style, key, name);
  Parts parts;
  parts.intro = tokenizer.encode(text.intro + "\n", /*add_bos=*/true);
  parts.needle = tokenizer.encode(text.needle + "\n");
  const auto letter = tokenizer.encode("a"), line = tokenizer.encode("a\n");
  parts.newline.assign(line.begin() + common_prefix(letter, line), line.end());
  // A token that holds the end of the question and the begin of the answer would belong to the answer.
  const auto answered = tokenizer.encode(text.question + " " + key);
  const auto answer = answered.begin() + common_prefix(tokenizer.encode(text.question), answered);
  parts.question.assign(answered.begin(), answer);
  parts.answer.assign(answer, answered.end());
  return parts;
}

}  // namespace

PasskeyStyle parse_passkey_style(const std::string& name) {
  if (name == "landmark") return PasskeyStyle::kLandmark;
  if (name == "ruler") return PasskeyStyle::kRuler;
  throw std::invalid_argument("style must be landmark or ruler, got " + name);
}

PasskeyPrompt passkey_prompt(const Tokenizer& tokenizer, PasskeyStyle style, int64_t length, double depth,
                             const std::string& key, const std::string& name) {
  require(depth >= 0 && depth <= 1, "depth must be in [0, 1], got " + std::to_string(depth));
  const Parts parts = parts_of(tokenizer, style, key, name);
  const int64_t room = length - parts.tokens();
  require(room >= 0, "lengths must be at least " + std::to_string(parts.tokens()) +
                         ", the tokens of the prompt without filler, got " + std::to_string(length));
  const auto text = filler(tokenizer, room);
  const auto split = text.begin() + std::llround(depth * static_cast<double>(room));

  PasskeyPrompt prompt;
  const auto append = [&prompt](auto begin, auto end) { prompt.ids.insert(prompt.ids.end(), begin, end); };
  append(parts.intro.begin(), parts.intro.end());
  append(text.begin(), split);
  append(parts.newline.begin(), parts.newline.end());
  prompt.needle = static_cast<int64_t>(prompt.ids.size());
  append(parts.needle.begin(), parts.needle.end());
  int64_t last_digit = static_cast<int64_t>(prompt.ids.size()) - 1;
  while (!has_digit(tokenizer, prompt.ids[static_cast<size_t>(last_digit)])) --last_digit;
  append(split, text.end());
  append(parts.newline.begin(), parts.newline.end());
  append(parts.question.begin(), parts.question.end());
  prompt.distance = length - 1 - last_digit;
  prompt.answer = parts.answer;
  return prompt;
}

bool passkey_found(PasskeyStyle style, const std::string& answer, const std::string& key) {
  if (style == PasskeyStyle::kRuler) return answer.find(key) != std::string::npos;
  const size_t begin = answer.find_first_of("0123456789");
  if (begin == std::string::npos) return false;
  const size_t end = answer.find_first_not_of("0123456789", begin);
  return answer.substr(begin, end == std::string::npos ? end : end - begin) == key;
}

const std::vector<std::string>& passkey_names() {
  static const std::vector<std::string> kNames = {"quiet-river",   "old-garden",    "bright-house", "long-letter",
                                                  "green-window",  "early-winter",  "warm-bridge",  "small-forest",
                                                  "clear-morning", "empty-station", "deep-valley",  "gentle-teacher"};
  return kNames;
}

int64_t shortest_passkey_prompt(const Tokenizer& tokenizer, PasskeyStyle style, int64_t digits) {
  int64_t tokens = 0;
  for (const std::string& name : passkey_names())
    tokens = std::max(tokens, parts_of(tokenizer, style, std::string(static_cast<size_t>(digits), '0'), name).tokens());
  return tokens;
}

bool has_digit(const Tokenizer& tokenizer, int64_t id) {
  return tokenizer.decode({id}).find_first_of("0123456789") != std::string::npos;
}

}  // namespace mixtral
