#include <gtest/gtest.h>

#include "io/json.h"
#include "io/printable.h"

namespace mixtral {
namespace {

TEST(Printable, LeavesReadableTextAlone) {
  for (const char* text : {"", "model-00001-of-00002.safetensors", "\\ \"quoted\" %s", "é ▁the 日本語 😀 مرحبا"}) {
    EXPECT_EQ(printable(text), text);
  }
}

TEST(Printable, EscapesWhatCommandsATerminalOrTurnsTextAround) {
  EXPECT_EQ(printable("a\n\x1b[31m\x7f"), "a\\u000a\\u001b[31m\\u007f");
  EXPECT_EQ(printable(std::string("\0", 1)), "\\u0000");
  EXPECT_EQ(printable("\u0080\u009b\u009f\u00a0"), "\\u0080\\u009b\\u009f\u00a0");
  for (const char* text : {"\u061c", "\u200e", "\u200f", "\u202a", "\u202b", "\u202c", "\u202d", "\u202e", "\u2066",
                           "\u2067", "\u2068", "\u2069", "\u2028", "\u2029", "\u200b", "\ufeff"}) {
    EXPECT_EQ(printable(text).substr(0, 2), "\\u") << text;
  }
}

TEST(Printable, EscapesEveryByteThatIsNoUtf8) {
  EXPECT_EQ(printable("a\xff\xe2\x96\xc3(\xed\xa0\x80"), "a\\xff\\xe2\\x96\\xc3(\\xed\\xa0\\x80");
}

TEST(Printable, CutsBetweenCharacters) {
  EXPECT_EQ(printable("ééé", 3), "éé...");
  EXPECT_EQ(printable("abc", 3), "abc");
}

TEST(Shown, IsShortWhateverTheSize) {
  EXPECT_EQ(shown({{"a", {1, 2.5, "é", nullptr}}}), R"({"a":[1,2.5,"\u00e9",null]})");
  for (const nlohmann::json& huge :
       {nlohmann::json(std::string(1 << 20, 'x')), nlohmann::json(std::vector<int>(1 << 20, 7)),
        nlohmann::json(std::vector<nlohmann::json>(1 << 20, nlohmann::json::object()))}) {
    EXPECT_EQ(shown(huge).size(), 67u);
  }
}

}  // namespace
}  // namespace mixtral
