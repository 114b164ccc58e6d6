#include <gtest/gtest.h>

#include "io/load_error.h"

namespace mixtral {
namespace {

TEST(LoadError, IsOneLineNamingFileItemAndReason) {
  const LoadError error("model.safetensors", "lm_head.weight", "shape [2], expected [3]");
  EXPECT_STREQ(error.what(), "model.safetensors: lm_head.weight: shape [2], expected [3]");
}

TEST(LoadError, EscapesAndShortensTextFromTheFile) {
  const LoadError error("f", std::string("a\nb") + std::string(1000, 'x'), "reason");
  const std::string what = error.what();
  EXPECT_EQ(what.find('\n'), std::string::npos);
  EXPECT_NE(what.find("a\\u000ab"), std::string::npos);
  EXPECT_LT(what.size(), 300u);
}

}  // namespace
}  // namespace mixtral
