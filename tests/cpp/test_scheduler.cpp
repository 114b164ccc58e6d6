#include <memory>

#include "engine/scheduler.h"
#include "fake_runner.h"
#include "generations.h"

namespace mixtral {
namespace {

class SchedulerTest : public ::testing::Test {
 protected:
  // Pages of four tokens, without a window.
  Scheduler& make(const Scheduler::Options& options, int64_t num_pages) {
    runner = std::make_unique<FakeRunner>(/*window=*/0, /*page_size=*/4, num_pages, options.chunk_size);
    scheduler = std::make_unique<Scheduler>(options, runner->cache());
    return *scheduler;
  }
  void add(int64_t prompt_length, int64_t max_tokens = 4, int64_t first_id = 1) {
    Request request;
    request.prompt_token_ids.assign(static_cast<size_t>(prompt_length), 1);
    request.prompt_token_ids[0] = first_id;
    request.params.max_tokens = max_tokens;
    request.experts_per_token = 2;
    const auto id = static_cast<int64_t>(sequences.size());
    sequences.push_back(std::make_unique<Sequence>(id, std::move(request), Callbacks(), std::nullopt));
    scheduler->add(*sequences.back());
  }
  // The plan as {id, tokens}; a sequence that has computed all its tokens gets one more.
  using Plan = std::vector<std::pair<int64_t, int64_t>>;
  Plan pass() {
    Plan plan;
    const auto chunks = scheduler->plan();
    if (chunks.empty()) return plan;
    for (const auto& [sequence, tokens] : chunks) plan.emplace_back(sequence->id, tokens);
    runner->launch(chunks);
    collect(chunks);
    return plan;
  }
  void collect(const std::vector<Scheduler::Chunk>& chunks) {
    for (const auto& chunk : chunks) chunk.sequence->in_flight = false;
    for (const Step& step : runner->collect()) step.sequence->append(step.samples.at(0));
    for (const auto& chunk : chunks) runner->cache().commit(chunk.sequence->cache_id, chunk.sequence->ids);
    scheduler->check_integrity();
    runner->cache().check_integrity();
  }
  // Leaves a pass in flight.
  std::vector<Scheduler::Chunk> launch() {
    const auto chunks = scheduler->plan();
    if (!chunks.empty()) runner->launch(chunks);
    for (const auto& chunk : chunks) chunk.sequence->in_flight = true;
    return chunks;
  }
  static std::vector<int64_t> ids_of(const std::vector<Scheduler::Chunk>& chunks) {
    std::vector<int64_t> ids;
    for (const auto& chunk : chunks) ids.push_back(chunk.sequence->id);
    return ids;
  }

  std::unique_ptr<FakeRunner> runner;
  std::unique_ptr<Scheduler> scheduler;
  std::vector<std::unique_ptr<Sequence>> sequences;
};

TEST_F(SchedulerTest, ComputesChunksOfPromptsAndNewestTokensWithinTheBudget) {
  make({/*chunk_size=*/4, /*token_budget=*/6, /*max_batch=*/8, /*prefix_cache=*/false}, 100);
  for (const int64_t length : {3, 5, 9}) add(length);
  EXPECT_EQ(pass(), (Plan{{0, 3}, {1, 3}}));
  EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 2}, {2, 3}}));
  EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 1}, {2, 4}}));
  EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 1}, {2, 2}}));
  EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 1}, {2, 1}}));
}

TEST_F(SchedulerTest, ReadsLessOfPromptsInAPassInWhichOthersDecode) {
  Scheduler::Options options{/*chunk_size=*/16, /*token_budget=*/64, /*max_batch=*/8, /*prefix_cache=*/false};
  options.mixed_chunk_size = 4;
  make(options, 100);
  add(20, /*max_tokens=*/9);
  EXPECT_EQ(pass(), (Plan{{0, 16}}));  // alone
  EXPECT_EQ(pass(), (Plan{{0, 4}}));
  for (const int64_t length : {11, 3, 9}) add(length, /*max_tokens=*/9);
  EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 4}, {2, 3}, {3, 1}}));  // 4 of each, 8 of all
  EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 4}, {2, 1}, {3, 4}}));
  EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 3}, {2, 1}, {3, 4}}));
  EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 1}, {2, 1}, {3, 1}}));
}

TEST_F(SchedulerTest, AdmitsInOrderWhileSeatsAndPagesLast) {
  make({16, 64, /*max_batch=*/3, false}, 8);
  add(8);   // two pages, soon three
  add(16);  // four, soon five
  add(1);   // would fit, but not beside those
  add(1);
  EXPECT_EQ(pass(), (Plan{{0, 8}, {1, 16}}));
  scheduler->remove(*sequences[0]);
  EXPECT_EQ(pass(), (Plan{{1, 1}, {2, 1}, {3, 1}}));
  add(1);
  EXPECT_EQ(pass(), (Plan{{1, 1}, {2, 1}, {3, 1}}));  // no seat
  scheduler->remove(*sequences[3]);
  EXPECT_EQ(pass(), (Plan{{1, 1}, {2, 1}, {4, 1}}));
  EXPECT_EQ(scheduler->stats().running, 3);
  EXPECT_EQ(scheduler->stats().waiting, 0);
}

TEST_F(SchedulerTest, NobodyOvertakes) {
  make({16, 64, 8, false}, 6);
  add(12);
  add(16);
  add(1);
  EXPECT_EQ(pass(), (Plan{{0, 12}}));
}

TEST_F(SchedulerTest, PassesOverASequenceWithoutANextToken) {
  make({16, 64, 8, true}, 20);
  for (const int64_t length : {1, 2, 3}) add(length);
  EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 2}, {2, 3}}));
  sequences[1]->ids.pop_back();  // it waits for a mask
  const auto chunks = scheduler->plan();
  ASSERT_EQ(chunks.size(), 2u);
  EXPECT_EQ(chunks[0].sequence, sequences[0].get());
  EXPECT_EQ(chunks[1].sequence, sequences[2].get());
}

TEST_F(SchedulerTest, RemovesWhatWaits) {
  make({16, 64, 1, true}, 10);
  add(1);
  add(1);
  scheduler->remove(*sequences[0]);
  EXPECT_EQ(pass(), (Plan{{1, 1}}));
}

TEST_F(SchedulerTest, TheNewestGivesItsPagesBackAndIsComputedAgain) {
  make({16, 64, 8, false}, 5);
  add(8, /*max_tokens=*/8);
  add(3, /*max_tokens=*/8);
  EXPECT_EQ(pass(), (Plan{{0, 8}, {1, 3}}));                              // 2 and 1 pages
  for (int i = 0; i < 4; ++i) EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 1}}));  // 3 and 2: all of them
  add(1);
  EXPECT_EQ(pass(), (Plan{{0, 1}}));  // the first takes a fourth; nobody is admitted in this pass
  EXPECT_EQ(scheduler->stats().preemptions, 1);
  EXPECT_EQ(scheduler->stats().waiting, 2);
  EXPECT_EQ(pass(), (Plan{{0, 1}}));  // one page is free: the second needs three, and the third comes after it
  scheduler->remove(*sequences[0]);
  EXPECT_EQ(pass(), (Plan{{1, 8}, {2, 1}}));  // its prompt and five new tokens
  EXPECT_EQ(sequences[1]->length(), 9);
}

TEST_F(SchedulerTest, WhoSharesAPrefixComputesTheRest) {
  make({16, 64, 8, true}, 20);
  add(10);
  EXPECT_EQ(pass(), (Plan{{0, 10}}));
  add(10);
  add(9);
  add(8);                      // all of it is cached, but the newest token must be computed
  add(10, 4, /*first_id=*/2);  // another prompt
  EXPECT_EQ(pass(), (Plan{{0, 1}, {1, 2}, {2, 1}, {3, 4}, {4, 10}}));
  EXPECT_EQ(scheduler->stats().prefix_queries, 10 + 10 + 9 + 8 + 10);
  EXPECT_EQ(scheduler->stats().prefix_hits, 8 + 8 + 4);
  EXPECT_EQ(sequences[1]->timings->cached_tokens, 8);
  // Two pages are shared by four; the third of each, and three of the other prompt.
  EXPECT_EQ(scheduler->stats().pages_in_use, 2 + 1 + 1 + 1 + 3);
}

TEST_F(SchedulerTest, APrefixThatIsBeingComputedIsWaitedFor) {
  make({/*chunk_size=*/8, 64, 8, true}, 40);
  add(22);
  add(15);
  add(15, 4, /*first_id=*/2);  // shares nothing, but does not overtake
  EXPECT_EQ(pass(), (Plan{{0, 8}}));
  EXPECT_EQ(pass(), (Plan{{0, 8}}));  // 12 of the second's 15 tokens are full pages that the first computes
  EXPECT_EQ(pass(), (Plan{{0, 6}, {1, 3}, {2, 8}}));
  EXPECT_EQ(scheduler->stats().prefix_hits, 12);
}

// ---- several passes in flight

TEST_F(SchedulerTest, EveryPassInFlightGetsItsShare) {
  make(with_depth({16, 64, /*max_batch=*/5, false}, 3), 100);
  for (int i = 0; i < 7; ++i) add(3, /*max_tokens=*/20);
  const auto first = launch(), second = launch(), third = launch();
  EXPECT_EQ(ids_of(first), (std::vector<int64_t>{0, 1}));  // a third of the five that may run
  EXPECT_EQ(ids_of(second), (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(ids_of(third), (std::vector<int64_t>{4}));
  collect(first);
  const auto fourth = launch();
  EXPECT_EQ(ids_of(fourth), (std::vector<int64_t>{0, 1}));
  collect(second);
  scheduler->remove(*sequences[2]);
  EXPECT_EQ(ids_of(launch()), (std::vector<int64_t>{3, 5}));
}

// Who waits for their masks takes no share from the others.
TEST_F(SchedulerTest, SharesAreOfThoseThatCanGoOn) {
  make(with_depth({16, 64, 8, false}, 2), 100);
  for (int i = 0; i < 6; ++i) add(1);
  const auto first = launch(), second = launch();
  collect(first);
  collect(second);
  for (const size_t waits : {0, 1, 2, 3}) {
    auto& sequence = *sequences[waits];
    sequence.ids.resize(static_cast<size_t>(sequence.computed));
  }
  EXPECT_EQ(ids_of(launch()), (std::vector<int64_t>{4}));
  EXPECT_EQ(ids_of(launch()), (std::vector<int64_t>{5}));
  EXPECT_TRUE(launch().empty());
}

// The oldest needs a page, and the newest, whose pages it may take, is in flight: it waits until that is collected.
TEST_F(SchedulerTest, NobodyInFlightGivesPagesBack) {
  make(with_depth({16, 64, 8, false, /*headroom=*/0}, 2), 4);
  add(8, 8);
  add(7, 8, 2);
  auto first = launch(), second = launch();
  EXPECT_EQ(ids_of(first), (std::vector<int64_t>{0}));
  EXPECT_EQ(ids_of(second), (std::vector<int64_t>{1}));
  collect(first);
  add(1);
  EXPECT_TRUE(launch().empty());  // neither the oldest, nor who waits
  EXPECT_EQ(scheduler->stats().preemptions, 0);
  collect(second);
  first = launch();
  EXPECT_EQ(ids_of(first), (std::vector<int64_t>{0}));
  EXPECT_EQ(scheduler->stats().preemptions, 1);
  EXPECT_EQ(scheduler->stats().waiting, 2);
}

}  // namespace
}  // namespace mixtral
