// What holds for every tokenizer that loads.
#pragma once

#include <string>
#include <vector>

#include "fuzz.h"
#include "text/tokenizer.h"

namespace mixtral::fuzzing {

// The text as a tokenizer keeps it: U+2581 stands for a space, and a byte that belongs to no character is lost.
inline std::string kept(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const Utf8Prefix prefix = utf8_prefix(text);
    const bool whole = prefix.kind == Utf8Prefix::kWhole;
    const std::string_view bytes = text.substr(0, whole ? prefix.length : 1);
    out += !whole ? "\xEF\xBF\xBD" : bytes == "\xE2\x96\x81" ? " " : bytes;
    text.remove_prefix(bytes.size());
  }
  return out;
}

// Returns what decode() makes of encode().
inline std::string round_trip(const Tokenizer& tokenizer, std::string_view text, bool parse_special) {
  const std::vector<int64_t> ids = tokenizer.encode(text, false, false, parse_special);
  StreamingDecoder decoder(tokenizer);
  std::string streamed;
  for (const int64_t id : ids) {
    check(0 <= id && id < tokenizer.vocab_size(), "ids are in the vocabulary");
    check(parse_special || !tokenizer.is_control(id), "text becomes no control token");
    const std::string shown = decoder.push(id);
    check(is_valid_utf8(shown), "no half character is shown");
    streamed += shown;
  }
  streamed += decoder.flush();
  const std::string decoded = tokenizer.decode(ids);
  check(decoded == streamed, "streaming and decode() agree");
  tokenizer.special_in(text);
  return decoded;
}

}  // namespace mixtral::fuzzing
