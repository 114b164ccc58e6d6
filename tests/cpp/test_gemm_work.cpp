// The shares into which threads cut a line of work and a grouped GEMM: nothing is missed and nothing done twice.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "ops/cpu/shared_work.h"
#include "ops/grouped_gemm/gemm_work.h"

namespace mixtral {
namespace {

TEST(SharedWork, SharesFollowEachOtherAndGetShorterDownToTheLeast) {
  cpu::SharedWork work(1000, /*threads=*/4, /*least=*/7);
  int64_t end = 0, size = 1000 / 8;
  for (auto share = work.take(); share.begin < share.end; share = work.take()) {
    EXPECT_EQ(share.begin, end);
    EXPECT_LE(share.end - share.begin, size);
    EXPECT_GE(share.end - share.begin, std::min<int64_t>(7, 1000 - share.begin));
    size = share.end - share.begin;
    end = share.end;
  }
  EXPECT_EQ(end, 1000);
  EXPECT_LE(size, 7);
  EXPECT_EQ(work.take().begin, work.take().end);
}

TEST(SharedWork, ThreadsNeverTakeTheSame) {
  constexpr int64_t kTotal = 200000;
  cpu::SharedWork work(kTotal, /*threads=*/4, /*least=*/1);
  std::vector<int> times(kTotal);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (auto share = work.take(); share.begin < share.end; share = work.take())
        for (int64_t at = share.begin; at < share.end; ++at) ++times[at];
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(times, std::vector<int>(kTotal, 1));
}

TEST(SharedWork, ItemsComeOneByOne) {
  cpu::SharedWork work = cpu::SharedWork::of_items(3);
  for (int64_t i = 0; i < 3; ++i) {
    const auto share = work.take();
    EXPECT_EQ(share.begin, i);
    EXPECT_EQ(share.end, i + 1);
  }
  EXPECT_EQ(work.take().begin, work.take().end);
}

// How often each (row, block) was in a share of one of the threads, in how many shares all were cut, and
// the most rows times blocks that one range had.
struct Cover {
  std::vector<int> times;
  int64_t shares = 0, largest = 0;
};

Cover cover(const std::vector<int64_t>& offs, int64_t blocks, int64_t threads) {
  const IndexArray ends{offs.data(), /*is_int64=*/true};
  Cover result{std::vector<int>(offs.back() * blocks)};
  GemmWork work(ends, static_cast<int64_t>(offs.size()), blocks, threads);
  std::atomic<int64_t> shares{0}, largest{0};
  std::vector<std::thread> running;
  const auto share = [&] {
    int64_t last_row = -1;
    work.take([&](int64_t expert, int64_t row, int64_t count) {
      EXPECT_GT(row, last_row) << "a thread comes to a chunk once";
      EXPECT_GE(row, expert > 0 ? offs[expert - 1] : 0);
      EXPECT_LE(row + count, offs[expert]);
      last_row = row;
      return [&, row, count, next = int64_t{0}](int64_t begin, int64_t end) mutable {
        EXPECT_GE(begin, next);
        EXPECT_LE(end, blocks);
        next = end;
        if (begin < end) {
          ++shares;
          for (int64_t size = count * (end - begin), most = largest;
               size > most && !largest.compare_exchange_weak(most, size);) {
          }
        }
        for (int64_t r = row; r < row + count; ++r)
          for (int64_t b = begin; b < end; ++b) ++result.times[r * blocks + b];
      };
    });
  };
  for (int64_t i = 0; i < threads; ++i) running.emplace_back(share);
  for (auto& thread : running) thread.join();
  result.shares = shares;
  result.largest = largest;
  return result;
}

TEST(GemmWork, EveryBlockOfEveryRowOnce) {
  const std::vector<std::vector<int64_t>> cases = {
      {1}, {0, 1, 1, 2}, {3, 3, 3, 40}, {700, 701, 705, 2048}, {0, 0, 5000}, {31, 64, 97, 1100}, {513}};
  for (const auto& offs : cases)
    for (const int64_t blocks : {1, 2, 7, 64, 448})
      for (const int64_t threads : {1, 2, 3, 16})
        EXPECT_EQ(cover(offs, blocks, threads).times, std::vector<int>(offs.back() * blocks, 1))
            << offs.back() << " rows, " << blocks << " blocks, " << threads << " threads";
}

TEST(GemmWork, ManyRowsCountMoreThanFew) {
  EXPECT_LT(cover({505, 506, 507, 508, 509, 510, 511, 512}, 64, 2).largest, 505 * 64 / 2);
}

TEST(GemmWork, ThereIsAPieceForEachThread) {
  EXPECT_GE(cover({1, 2}, 64, 16).shares, 16);      // a token
  EXPECT_GE(cover({1024}, 1, 16).shares, 16);       // a router: fewer blocks than threads
  EXPECT_GE(cover({505, 512}, 64, 16).shares, 16);  // nearly all rows at one expert
}

TEST(GemmWork, EveryBlockOfEveryRowOfAnExpertOnceWhateverItsDepth) {
  constexpr int64_t kRows = 1100, kBlocks = 7, kThreads = 3;
  const std::vector<int64_t> offs{0, 900, 900, 901};
  GemmWork work = GemmWork::of_depths({offs.data(), /*is_int64=*/true}, 4, kRows, kBlocks, kThreads);
  std::vector<int> times(4 * kRows * kBlocks);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i)
    threads.emplace_back([&] {
      work.take([&](int64_t expert, int64_t row, int64_t count) {
        EXPECT_LE(row + count, kRows);
        return [&, expert, row, count](int64_t begin, int64_t end) {
          for (int64_t r = row; r < row + count; ++r)
            for (int64_t b = begin; b < end; ++b) ++times[(expert * kRows + r) * kBlocks + b];
        };
      });
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(times, std::vector<int>(times.size(), 1));
}

}  // namespace
}  // namespace mixtral
