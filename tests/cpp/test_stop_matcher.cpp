#include <gtest/gtest.h>

#include "text/stop_matcher.h"

namespace mixtral {
namespace {

// All the text that comes out when `text` goes in `step` bytes at a time.
std::string matched(const std::vector<std::string>& stop, const std::string& text, size_t step,
                    bool* stopped = nullptr) {
  StopMatcher matcher(stop);
  std::string out;
  for (size_t i = 0; i < text.size(); i += step) out += matcher.push(text.substr(i, step));
  out += matcher.flush();
  if (stopped) *stopped = matcher.stopped();
  return out;
}

TEST(StopMatcher, CutsBeforeTheStopStringHoweverTheTextArrives) {
  bool stopped = false;
  for (size_t step = 1; step <= 12; ++step) {
    EXPECT_EQ(matched({"END"}, "one ENEND two END", step, &stopped), "one EN");
    EXPECT_TRUE(stopped);
    EXPECT_EQ(matched({"END"}, "one EN", step, &stopped), "one EN");
    EXPECT_FALSE(stopped);
    EXPECT_EQ(matched({"abcd", "bc"}, "xabcd", step), "xa");  // "bc" is whole first
    EXPECT_EQ(matched({"bc", "abc"}, "xabcd", step), "x");    // both end together: the longer one
    EXPECT_EQ(matched({"aab"}, "aaab", step), "a");
    EXPECT_EQ(matched({}, "text", step), "text");
    EXPECT_EQ(matched({"日本"}, "x日日本語", step), "x日");
  }
}

TEST(StopMatcher, HoldsBackOnlyWhatMayBeginAStopString) {
  StopMatcher matcher({"\n\nUser:", "###"});
  EXPECT_EQ(matcher.push("Hello\n"), "Hello");
  EXPECT_EQ(matcher.push("\n"), "");
  EXPECT_EQ(matcher.push("You"), "\n\nYou");
  EXPECT_EQ(matcher.push("##"), "");
  EXPECT_EQ(matcher.push("! #"), "##! ");
  EXPECT_EQ(matcher.push("##tail"), "");
  EXPECT_TRUE(matcher.stopped());
  EXPECT_EQ(matcher.push("more"), "");
  EXPECT_EQ(matcher.flush(), "");
}

}  // namespace
}  // namespace mixtral
