// The input is a text and, after "----", a whole tokenizer.json if the text starts with "!"; else six parts, which make
// a folder: added tokens, pieces and merges beside those that each tokenizer.json has here, the keys of tokenizer.json
// about spaces, tokenizer_config.json and added_tokens.json.
#include "tokenizer.h"

using namespace mixtral;

namespace {

std::string bytes_and_control_tokens() {
  std::string vocabulary = R"("<unk>":0,"<s>":1,"</s>":2)";
  for (int i = 0; i < 256; ++i) {
    char piece[24];
    std::snprintf(piece, sizeof piece, ",\"<0x%02X>\":%d", i, 3 + i);
    vocabulary += piece;
  }
  return vocabulary + ",\"\u2581\":259";
}

std::string added_token(const char* text, int id) {
  return "{\"content\":\"" + std::string(text) + "\",\"special\":true,\"id\":" + std::to_string(id) + "}";
}

std::string tokenizer_json(std::string_view& input) {
  static const std::string vocabulary = bytes_and_control_tokens();
  const auto more = [&] {
    const std::string_view part = fuzzing::take_part(input);
    return (part.empty() ? "" : ",") + std::string(part);
  };
  std::string text = "{\"added_tokens\":[" + added_token("<s>", 1) + "," + added_token("</s>", 2) + more() + "]";
  text += ",\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"unk_token\":\"<unk>\"";
  text += ",\"vocab\":{" + vocabulary + more() + "}";
  text += ",\"merges\":[" + std::string(fuzzing::take_part(input)) + "]}";
  return text + more() + "}";
}

}  // namespace

void fuzz(std::string_view input) {
  const std::string_view text = fuzzing::take_part(input);
  const bool whole = text.substr(0, 1) == "!";
  fuzzing::write("tokenizer.json", whole ? std::string(input) : tokenizer_json(input));
  fuzzing::write("tokenizer_config.json", whole ? "{}" : fuzzing::take_part(input));
  fuzzing::write("added_tokens.json", whole ? "{}" : fuzzing::take_part(input));
  const Tokenizer tokenizer(fuzzing::folder());
  fuzzing::round_trip(tokenizer, text, false);
  fuzzing::round_trip(tokenizer, text, true);
}
