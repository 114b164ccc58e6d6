// The input is a text and, after "----", a tokenizer.model: whole if the text starts with "!", else without what each
// must have, which is put before it (two protobuf messages in a row are one).
#include "tokenizer.h"

using namespace mixtral;

namespace {

std::string field(int number, const std::string& bytes) {
  return std::string(1, static_cast<char>(number * 8 + 2)) + static_cast<char>(bytes.size()) + bytes;
}

std::string needed_by_all() {
  const auto piece = [](const std::string& text, char type) { return field(1, field(1, text) + '\x18' + type); };
  std::string bytes = piece("<unk>", 2) + piece("<s>", 3) + piece("</s>", 3) + piece("\u2581", 1);
  for (int i = 0; i < 256; ++i) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", i);
    bytes += piece(text, 6);
  }
  return bytes + field(2, "\x18\x02\x98\x02\x01") + field(3, field(1, "identity") + std::string("\x20\0", 2));
}

}  // namespace

void fuzz(std::string_view input) {
  static const std::string base = needed_by_all();
  const std::string_view text = fuzzing::take_part(input);
  const bool whole = text.substr(0, 1) == "!";
  const Tokenizer tokenizer(fuzzing::write("tokenizer.model", (whole ? "" : base) + std::string(input)));
  fuzzing::check(fuzzing::round_trip(tokenizer, text, false) == fuzzing::kept(text), "the text comes back");
  fuzzing::round_trip(tokenizer, text, true);
}
