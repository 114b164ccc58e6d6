// Guesses from earlier text, and when they pay.
#include <gtest/gtest.h>

#include "engine/speculation.h"

namespace mixtral {
namespace {

using Ids = std::vector<int64_t>;

TEST(Speculation, GuessesWhatFollowedTheLongestMatch) {
  // The newest four, 1 2 3 4, were followed by 7; the newest three also by 8, and later.
  EXPECT_EQ(look_up({1, 2, 3, 4, 7, 9, 0, 2, 3, 4, 8, 5, 1, 2, 3, 4}, 2), (Ids{7, 9}));
  EXPECT_EQ(look_up({5, 2, 3, 4, 8, 6, 1, 2, 3, 4}, 3), (Ids{8, 6, 1}));
  EXPECT_EQ(look_up({3, 4, 8, 6, 1, 2, 3, 4}, 1), (Ids{8}));
}

TEST(Speculation, GuessesWhatFollowedTheLastOfEqualMatches) {
  EXPECT_EQ(look_up({1, 2, 3, 5, 1, 2, 4, 5, 1, 2}, 2), (Ids{4, 5}));
}

TEST(Speculation, GoesOnInALoop) {
  EXPECT_EQ(look_up({9, 1, 2, 1, 2, 1}, 5), (Ids{2, 1, 2, 1, 2}));
  EXPECT_EQ(look_up({7, 7, 7}, 3), (Ids{7, 7, 7}));
  EXPECT_EQ(look_up({1, 2, 3, 1, 2}, 7), (Ids{3, 1, 2, 3, 1, 2, 3}));
}

TEST(Speculation, GuessesNothingWithoutAMatchOfTwo) {
  for (const Ids& ids : {Ids{}, Ids{1}, Ids{1, 1}, Ids{1, 2, 3, 1}, Ids{1, 2, 3, 4, 5, 6}})
    EXPECT_TRUE(look_up(ids, 8).empty());
}

TEST(Speculation, AGateTriesWithFewTokensAndOpensWhereThatPays) {
  DraftGate gate;
  EXPECT_EQ(gate.open(8), 2);
  gate.learn(1.5);
  EXPECT_EQ(gate.open(8), 8);
  EXPECT_EQ(gate.open(1), 1);
}

TEST(Speculation, AGateClosesWhereGuessesDoNotPayAndTriesAgainLater) {
  DraftGate gate;
  gate.learn(3);
  EXPECT_EQ(gate.open(8), 8);
  for (int i = 0; i < 20 && gate.open(8) > 0; ++i) gate.learn(0.4);
  int closed = 1;
  while (gate.open(8) == 0) ++closed;
  EXPECT_EQ(closed, 64);
  gate.learn(3);
  EXPECT_EQ(gate.open(8), 8);
}

}  // namespace
}  // namespace mixtral
