#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <random>

#include "engine/scheduler.h"

namespace mixtral {
namespace {

class SchedulerTest : public ::testing::Test {
 protected:
  Sequence& add(Scheduler& scheduler, int64_t prompt_length, int64_t max_pages = 1) {
    Request request;
    request.prompt_token_ids.assign(static_cast<size_t>(prompt_length), 1);
    const auto id = static_cast<int64_t>(sequences.size());
    sequences.push_back(std::make_unique<Sequence>(id, std::move(request), Callbacks(), std::nullopt));
    sequences.back()->max_pages = max_pages;
    scheduler.add(*sequences.back());
    return *sequences.back();
  }
  // The plan as {id, tokens}; its tokens count as computed, and a sequence that has computed all gets one more.
  static std::vector<std::pair<int64_t, int64_t>> pass(const Scheduler& scheduler) {
    std::vector<std::pair<int64_t, int64_t>> plan;
    for (const auto& [sequence, tokens] : scheduler.plan()) {
      plan.emplace_back(sequence->id, tokens);
      sequence->computed += tokens;
      if (sequence->computed == sequence->length()) sequence->ids.push_back(1);
    }
    return plan;
  }
  using Plan = std::vector<std::pair<int64_t, int64_t>>;

  std::vector<std::unique_ptr<Sequence>> sequences;
};

TEST_F(SchedulerTest, ComputesChunksOfPromptsAndNewestTokensWithinTheBudget) {
  Scheduler scheduler({/*chunk_size=*/4, /*token_budget=*/6, /*max_batch=*/8});
  for (const int64_t length : {3, 5, 9}) add(scheduler, length);
  while (scheduler.admit(100)) {
  }
  EXPECT_EQ(pass(scheduler), (Plan{{0, 3}, {1, 3}}));
  EXPECT_EQ(pass(scheduler), (Plan{{0, 1}, {1, 2}, {2, 3}}));
  EXPECT_EQ(pass(scheduler), (Plan{{0, 1}, {1, 1}, {2, 4}}));
  EXPECT_EQ(pass(scheduler), (Plan{{0, 1}, {1, 1}, {2, 2}}));
  EXPECT_EQ(pass(scheduler), (Plan{{0, 1}, {1, 1}, {2, 1}}));
}

TEST_F(SchedulerTest, AdmitsInOrderWhileSeatsAndPagesLast) {
  Scheduler scheduler({16, 64, /*max_batch=*/3});
  add(scheduler, 1, 4);
  add(scheduler, 1, 7);
  add(scheduler, 1, 1);
  add(scheduler, 1, 1);
  EXPECT_EQ(scheduler.wanted_pages(), 4 + 7 + 1);
  EXPECT_FALSE(scheduler.admit(3));
  EXPECT_TRUE(scheduler.admit(10));
  EXPECT_EQ(scheduler.reserved_pages(), 4);
  EXPECT_FALSE(scheduler.admit(10));  // 4 + 7 do not fit, and nobody overtakes
  EXPECT_TRUE(scheduler.admit(11));
  EXPECT_TRUE(scheduler.admit(12));
  EXPECT_EQ(scheduler.next(), nullptr);  // no seat
  EXPECT_FALSE(scheduler.admit(100));
  scheduler.remove(*sequences[1]);
  EXPECT_EQ(scheduler.reserved_pages(), 5);
  EXPECT_EQ(scheduler.next(), sequences[3].get());
  EXPECT_TRUE(scheduler.admit(6));
  EXPECT_EQ(scheduler.running(), (std::vector<Sequence*>{sequences[0].get(), sequences[2].get(), sequences[3].get()}));
}

TEST_F(SchedulerTest, PassesOverASequenceWithoutANextToken) {
  Scheduler scheduler({16, 64, 8});
  for (const int64_t length : {1, 2, 3}) add(scheduler, length);
  while (scheduler.admit(100)) {
  }
  sequences[1]->computed = 2;
  EXPECT_EQ(pass(scheduler), (Plan{{0, 1}, {2, 3}}));
}

TEST_F(SchedulerTest, RemovesWhatWaits) {
  Scheduler scheduler({16, 64, 1});
  add(scheduler, 1);
  add(scheduler, 1);
  scheduler.remove(*sequences[0]);
  EXPECT_TRUE(scheduler.admit(1));
  EXPECT_EQ(pass(scheduler), (Plan{{1, 1}}));
}

TEST_F(SchedulerTest, RandomArrivalsNeverReserveMoreThanThePoolAndAllEnd) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    std::mt19937 random(seed);
    const auto pick = [&](int64_t low, int64_t high) {
      return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
    };
    sequences.clear();
    const Scheduler::Options options{pick(1, 8), pick(1, 20), pick(1, 5)};
    Scheduler scheduler(options);
    const int64_t pages = pick(5, 12);
    std::map<int64_t, int64_t> left;  // new tokens to come
    int64_t last_admitted = -1;
    for (int added = 0; added < 40 || !left.empty();) {
      if (added < 40 && pick(0, 1) == 0) left[add(scheduler, pick(1, 20), pick(1, 5)).id] = pick(1, 6), ++added;
      while (Sequence* const next = scheduler.next()) {
        if (!scheduler.admit(pages)) break;
        ASSERT_GT(next->id, last_admitted);
        last_admitted = next->id;
      }
      ASSERT_LE(scheduler.reserved_pages(), pages);
      ASSERT_LE(static_cast<int64_t>(scheduler.running().size()), options.max_batch);
      int64_t total = 0;
      for (const auto& [sequence, tokens] : scheduler.plan()) {
        ASSERT_GT(tokens, 0);
        ASSERT_LE(tokens, options.chunk_size);
        total += tokens;
        sequence->computed += tokens;
        ASSERT_LE(sequence->computed, sequence->length());
        if (sequence->computed < sequence->length()) continue;
        sequence->ids.push_back(1);
        if (--left[sequence->id] > 0) continue;
        left.erase(sequence->id);
        scheduler.remove(*sequence);
      }
      ASSERT_LE(total, options.token_budget);
      ASSERT_TRUE(total > 0 || scheduler.running().empty());
    }
    EXPECT_EQ(scheduler.reserved_pages(), 0);
  }
}

}  // namespace
}  // namespace mixtral
