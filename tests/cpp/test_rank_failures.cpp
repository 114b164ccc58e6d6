// A rank that fails, is silent, or is killed: the others say which one it was.
#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <thread>

#include "rank_group.h"

namespace mixtral {
namespace {

class RankFailures : public Ranks {};
INSTANTIATE_TEST_SUITE_P(All, RankFailures, kRankCases, name_of);

// Returns on `rank` when the others have left this: then it may fail.
void let_others_pass(Communicator& ranks, int rank) {
  ranks.barrier();
  const torch::Tensor byte = torch::zeros({1}, torch::kByte);
  if (ranks.rank() != rank) return ranks.send(byte, rank);
  for (int other = 0; other < ranks.size(); ++other) {
    if (other != rank) ranks.receive(byte, other);
  }
}

TEST_P(RankFailures, ASilentRankIsNamedAfterTheTimeout) {
  const auto start = std::chrono::steady_clock::now();
  run(
      [](Communicator& ranks) {
        ranks.barrier();
        const torch::Tensor tensor = torch::zeros({4});
        if (ranks.rank() == 1) {
          std::this_thread::sleep_for(std::chrono::milliseconds(2300));
          return;
        }
        // Rank 0 waits for the last one, which waits for the silent one.
        const int from = ranks.rank() == 0 && ranks.size() > 2 ? ranks.size() - 1 : 1;
        const RankError error = rank_error_of([&] { ranks.receive(tensor, from); });
        EXPECT_EQ(error.rank, 1);
        EXPECT_STREQ(error.what(), "rank 1 was silent for 1 s");
        EXPECT_EQ(rank_error_of([&] { ranks.barrier(); }).rank, 1);  // of no more use
      },
      /*timeout=*/1);
  EXPECT_LT(seconds_since(start), 30);
}

TEST_P(RankFailures, ARankThatIsAliveMayKeepTheOthersWaiting) {
  run(
      [](Communicator& ranks) {
        if (ranks.rank() == 1) {
          for (int i = 0; i < 20; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            ranks.keep_alive();
          }
        }
        EXPECT_EQ(ranks.exchange_texts("x").back(), "x");
      },
      /*timeout=*/0.7);
}

// Gloo has no such waits.
TEST_P(RankFailures, ARankThatIsAliveMayKeepWaitingThoseThatWaitForOthers) {
  if (GetParam().backend == "gloo" || size() == 2) GTEST_SKIP() << "needs shared memory and three ranks";
  run(
      [](Communicator& ranks) {
        const int last = ranks.size() - 1;
        const torch::Tensor tensor = torch::zeros({4});
        if (ranks.rank() == 1) {
          for (int i = 0; i < 25; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            ranks.keep_alive();
          }
          ranks.send(torch::ones({4}), last);
        } else if (ranks.rank() == last) {
          ranks.receive(tensor, 1);
          ranks.send(tensor, 0);
        } else if (ranks.rank() == 0) {
          ranks.receive(tensor, last);
          EXPECT_EQ(tensor.sum().item<float>(), 4);
        }
      },
      /*timeout=*/0.7);
}

TEST_P(RankFailures, TheReasonOfAFailureReachesTheOthers) {
  run([](Communicator& ranks) {
    const torch::Tensor tensor = torch::zeros({4});
    let_others_pass(ranks, 1);
    if (ranks.rank() == 1) return ranks.fail("no memory for layer 3");
    const int from = ranks.rank() == 0 && ranks.size() > 2 ? ranks.size() - 1 : 1;
    const RankError error = rank_error_of([&] { ranks.receive(tensor, from); });
    EXPECT_STREQ(error.what(), "rank 1 failed: no memory for layer 3");
    ranks.fail("something that follows from it");
    EXPECT_EQ(error.rank, 1);
  });
}

TEST_P(RankFailures, WhatARankSentBeforeItsEndArrives) {
  run([](Communicator& ranks) {
    const torch::Tensor tensor = torch::zeros({70'000});
    if (ranks.rank() == 1) {
      ranks.send(torch::ones({1000}), 0);
      ranks.send(torch::ones({50'000}), 0);
      return;
    }
    if (ranks.rank() != 0) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    ranks.receive(tensor.narrow(0, 0, 1000), 1);
    ranks.receive(tensor.narrow(0, 1000, 50'000), 1);
    EXPECT_EQ(tensor.sum().item<float>(), 51'000);
    if (GetParam().backend == "threads") return;
    EXPECT_STREQ(rank_error_of([&] { ranks.receive(tensor, 1); }).what(), "rank 1 ended");
  });
}

TEST_P(RankFailures, AKilledRankIsNoticedAtOnce) {
  if (GetParam().backend == "threads") GTEST_SKIP() << "a thread cannot be killed alone";
  for (const int killed : {0, size() - 1}) {
    run(
        [&](Communicator& ranks) {
          let_others_pass(ranks, killed);
          if (ranks.rank() == killed) std::raise(SIGKILL);
          const auto start = std::chrono::steady_clock::now();
          const RankError error = rank_error_of([&] { ranks.barrier(); });
          EXPECT_EQ(error.rank, killed) << error.what();
          EXPECT_LT(seconds_since(start), 10);
        },
        /*timeout=*/60, killed);
  }
}

TEST_P(RankFailures, ARankThatOnlySendsNoticesAKilledOne) {
  if (GetParam().backend == "threads") GTEST_SKIP() << "a thread cannot be killed alone";
  run(
      [](Communicator& ranks) {
        let_others_pass(ranks, 1);
        if (ranks.rank() == 1) std::raise(SIGKILL);
        const auto start = std::chrono::steady_clock::now();
        const RankError error = rank_error_of([&] {
          while (seconds_since(start) < 20) {
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
            ranks.send(torch::zeros({1}), 1);
          }
        });
        EXPECT_EQ(error.rank, 1);
      },
      /*timeout=*/60, /*killed=*/1);
}

}  // namespace
}  // namespace mixtral
