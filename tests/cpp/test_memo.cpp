// Remembered results: made once, told apart by every word of their arguments, bounded in number.
#include <gtest/gtest.h>

#include "ops/cuda/memo.h"

namespace mixtral::cuda {
namespace {

using Sums = Memo<uint64_t, 3, 4>;

struct CountedSum {
  Sums sums;
  int made = 0;
  uint64_t operator()(const Sums::Key& key) {
    uint64_t sum = 0;
    EXPECT_TRUE(sums.get(key, &sum, [&](uint64_t* value) {
      ++made;
      *value = key[0] + 10 * key[1] + 100 * key[2];
      return true;
    }));
    return sum;
  }
};

TEST(Memo, MakesAResultOnceForEachWordOfItsArguments) {
  CountedSum sum;
  for (int turn = 0; turn < 3; ++turn) {
    EXPECT_EQ(sum({1, 2, 3}), 321u);
    EXPECT_EQ(sum({4, 2, 3}), 324u);
    EXPECT_EQ(sum({1, 5, 3}), 351u);
    EXPECT_EQ(sum({1, 2, 6}), 621u);
  }
  EXPECT_EQ(sum.made, 4);
}

TEST(Memo, ForgetsAllWhenFull) {
  CountedSum sum;
  for (uint64_t i = 0; i < 5; ++i) EXPECT_EQ(sum({i, 0, 0}), i);
  EXPECT_EQ(sum({4, 0, 0}), 4u);  // the newest is there
  EXPECT_EQ(sum.made, 5);
  EXPECT_EQ(sum({0, 0, 0}), 0u);
  EXPECT_EQ(sum.made, 6);
}

TEST(Memo, DoesNotRememberThatThereIsNoResult) {
  Sums sums;
  uint64_t value = 7;
  EXPECT_FALSE(sums.get({1, 1, 1}, &value, [](uint64_t*) { return false; }));
  EXPECT_TRUE(sums.get({1, 1, 1}, &value, [](uint64_t* made) { return *made = 9, true; }));
  EXPECT_EQ(value, 9u);
}

}  // namespace
}  // namespace mixtral::cuda
