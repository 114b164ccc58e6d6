#include <gtest/gtest.h>

#include <stdexcept>

#include "io/size.h"

namespace mixtral {
namespace {

TEST(Size, IsReadAsItIsWritten) {
  EXPECT_EQ(parse_size("123"), 123);
  EXPECT_EQ(parse_size("123B"), 123);
  EXPECT_EQ(parse_size("64k"), 64 << 10);
  EXPECT_EQ(parse_size("512MiB"), 512 << 20);
  EXPECT_EQ(parse_size("512mb"), 512 << 20);
  EXPECT_EQ(parse_size("4GiB"), int64_t{4} << 30);
  EXPECT_EQ(parse_size("1.5g"), int64_t{3} << 29);
  EXPECT_EQ(parse_size(".5G"), int64_t{1} << 29);
  EXPECT_EQ(parse_size("2T"), int64_t{2} << 40);
}

TEST(Size, RefusesWhatIsNoSize) {
  for (const char* text : {"", "much", "0", "-1", "0.5", "-4GiB", "+4", "4 GiB", "4GiBs", "4x", "4ib", "4bb", "1e9",
                           "0x10", "inf", "nan", "9223372036854775808", "8388608TiB", "99999999999999999999T"}) {
    try {
      ADD_FAILURE() << text << " is " << parse_size(text);
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(error.what(), std::string("must be a size such as 4GiB, got ") + text);
    }
  }
}

TEST(Size, IsWrittenInTheLargestUnitItFills) {
  EXPECT_EQ(bytes_text(0), "0 B");
  EXPECT_EQ(bytes_text(1023), "1023 B");
  EXPECT_EQ(bytes_text(1024), "1.00 KiB");
  EXPECT_EQ(bytes_text(1.5 * (1 << 30)), "1.50 GiB");
  EXPECT_EQ(bytes_text(4096.0 * 1024 * (1 << 30)), "4096.00 TiB");
}

}  // namespace
}  // namespace mixtral
