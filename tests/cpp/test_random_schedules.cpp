// The engine on a model that is nothing but its cache: thousands of schedules, each result that of the request alone.
#include <map>
#include <random>

#include "fake_runner.h"
#include "generations.h"

namespace mixtral {
namespace {

struct Ended {
  int times = 0;
  Outcome outcome;
};

// Requests for a core, and how they ended.
struct Clients {
  explicit Clients(EngineCore& core) : core(core) {}

  void add(int64_t id, std::vector<int64_t> prompt, int64_t max_tokens, int64_t experts = 2) {
    Request request;
    request.prompt_token_ids = std::move(prompt);
    request.params.max_tokens = max_tokens;
    request.experts_per_token = experts;
    Callbacks callbacks;
    callbacks.on_end = [&end = ended[id]](Outcome outcome) {
      ++end.times;
      end.outcome = std::move(outcome);
    };
    core.add(std::make_unique<Sequence>(id, std::move(request), std::move(callbacks), std::nullopt));
  }
  void step() {
    core.step();
    core.check_integrity();
  }
  void expect_alone(int64_t id, int64_t count, int64_t window, int64_t experts = 2) const {
    const Generation& generation = ended.at(id).outcome.generation;
    ASSERT_EQ(ended.at(id).times, 1);
    ASSERT_EQ(generation.finish_reason, "length");
    const auto expected = fake_samples(generation.prompt_token_ids, count, window, experts);
    ASSERT_EQ(generation.token_ids.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_EQ(generation.token_ids[i], expected[i].token_id) << "request " << id << ", token " << i;
      ASSERT_EQ(generation.logprobs[i].logprob, expected[i].logprob->logprob) << "request " << id << ", token " << i;
    }
  }

  EngineCore& core;
  std::map<int64_t, Ended> ended;
};

std::vector<int64_t> fake_prompt(int64_t length, std::mt19937& random) {
  std::vector<int64_t> ids(static_cast<size_t>(length));
  for (size_t i = 0; i < ids.size(); ++i)
    ids[i] = random() % 16 == 0 ? static_cast<int64_t>(random() % kFakeVocab) : static_cast<int64_t>(i % kFakeVocab);
  return ids;
}

struct Totals {
  EngineStats stats;
  int64_t accepted = 0, cancelled = 0;  // guesses; requests
};

// Arrivals, cancellations, exceptions of passes, NaNs, preemptions, shared prefixes, guesses: every request ends once,
// no page is lost, and what is not disturbed itself has the result of a request that is alone.
void run_schedule(unsigned seed, int64_t depth, Totals& total) {
  std::mt19937 random(seed);
  const auto pick = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
  };
  const int64_t window = pick(0, 2) == 0 ? 0 : pick(1, 14), page_size = pick(1, 5);
  const int64_t token_budget = pick(1, 20);
  const Scheduler::Options options{std::min(pick(1, 9), token_budget),
                                   token_budget,
                                   pick(1, 5),
                                   /*prefix_cache=*/pick(0, 7) > 0,
                                   /*headroom=*/pick(0, 8),
                                   /*mixed_chunk_size=*/pick(0, 1) * pick(1, 6),
                                   depth};
  const int64_t chunk = options.chunk_size, longest = pick(5, 30);
  const int64_t least = RollingKVCache::pages_needed(FakeRunner::config(window), page_size, chunk, longest);
  auto owned = std::make_unique<FakeRunner>(window, page_size, least + pick(0, least), chunk);
  FakeRunner& runner = *owned;
  const bool faults = pick(0, 3) == 0;
  runner.before_pass = runner.before_launch = [&] {
    if (faults && pick(0, 60) == 0) throw std::runtime_error("a fault");
  };
  runner.is_nan = [&] { return faults && pick(0, 60) == 0; };
  const int64_t speculate = pick(0, 2) == 0 ? pick(1, 6) : 0;
  EngineCore core(std::move(owned), options, speculate);
  Clients clients(core);
  struct Asked {
    int64_t max_tokens, experts;
  };
  std::map<int64_t, Asked> asked;
  const int64_t count = pick(1, 12);
  for (int64_t steps = 0; static_cast<int64_t>(asked.size()) < count || !core.idle(); ++steps) {
    ASSERT_LT(steps, 2000) << "a request starves";
    while (static_cast<int64_t>(asked.size()) < count && pick(0, 2) == 0) {
      const int64_t id = static_cast<int64_t>(asked.size()), length = pick(1, longest - 1);
      asked[id] = {pick(1, longest - length), pick(0, 5) == 0 ? 1 : 2};
      clients.add(id, fake_prompt(length, random), asked[id].max_tokens, asked[id].experts);
    }
    if (pick(0, 15) == 0) core.cancel(pick(0, count));
    const int64_t before = core.stats().computed_tokens;
    clients.step();
    ASSERT_TRUE(core.stats().computed_tokens > before || core.idle() || faults) << "no progress";
  }
  for (const auto& [id, end] : clients.ended) {
    ASSERT_EQ(end.times, 1) << "request " << id;
    const Generation& generation = end.outcome.generation;
    total.accepted += end.outcome.timings.accepted_tokens;
    total.cancelled += generation.finish_reason == "cancelled";
    if (end.outcome.error || generation.finish_reason != "length") continue;
    clients.expect_alone(id, asked[id].max_tokens, window, asked[id].experts);
    if (::testing::Test::HasFatalFailure()) return;
  }
  ASSERT_EQ(core.stats().pages_in_use, 0);
  total.stats.preemptions += core.stats().preemptions;
  total.stats.prefix_hits += core.stats().prefix_hits;
  total.stats.prompt_tokens += core.stats().prompt_tokens;
}

// ThreadSanitizer takes many times as long, and has one thread to look at here.
#ifdef __SANITIZE_THREAD__
constexpr unsigned kSchedules = 1000;
#else
constexpr unsigned kSchedules = 10000;
#endif

class RandomSchedulesInFlight : public ::testing::TestWithParam<int64_t> {};
INSTANTIATE_TEST_SUITE_P(Depth, RandomSchedulesInFlight, ::testing::Values(1, 2, 4));

TEST_P(RandomSchedulesInFlight, EveryRequestEndsOnceWithTheResultOfOneThatIsAlone) {
  Totals total;
  for (unsigned seed = 0; seed < kSchedules; ++seed) {
    run_schedule(seed, GetParam(), total);
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
  }
  // The schedules are of the kind that this test is for.
  EXPECT_GT(total.stats.preemptions, kSchedules / 20);
  EXPECT_GT(total.stats.prefix_hits, total.stats.prompt_tokens / 20);
  EXPECT_GT(total.accepted, kSchedules / 10);
  EXPECT_GT(total.cancelled, kSchedules / 10);
}

TEST(RandomSchedules, APoolForTwoServesEightAndComputesLittleTwice) {
  int64_t again = 0, preemptions = 0, computed = 0;
  for (unsigned seed = 0; seed < 100; ++seed) {
    std::mt19937 random(seed);
    const int64_t window = seed % 2 ? 0 : 24, page_size = 4, longest = 64;
    const int64_t pages = 2 * RollingKVCache::pages_needed(FakeRunner::config(window), page_size, 16, longest);
    EngineCore core(std::make_unique<FakeRunner>(window, page_size, pages, 16), {16, 64, 8, true, /*headroom=*/12});
    Clients clients(core);
    std::map<int64_t, int64_t> max_tokens;
    for (int64_t id = 0; id < 8; ++id) {
      const int64_t length = 8 + static_cast<int64_t>(random() % 24);
      max_tokens[id] = 8 + static_cast<int64_t>(random() % 24);
      std::vector<int64_t> prompt(static_cast<size_t>(length));
      for (int64_t& token : prompt) token = static_cast<int64_t>(random() % kFakeVocab);
      clients.add(id, std::move(prompt), max_tokens[id]);
    }
    while (!core.idle()) clients.step();
    int64_t least = 0;  // tokens to compute without preemption
    for (const auto& [id, count] : max_tokens) {
      clients.expect_alone(id, count, window);
      least += static_cast<int64_t>(clients.ended[id].outcome.generation.prompt_token_ids.size()) + count - 1;
    }
    again += core.stats().computed_tokens + core.stats().prefix_hits - least;
    computed += core.stats().computed_tokens;
    preemptions += core.stats().preemptions;
  }
  EXPECT_GT(preemptions, 20);
  EXPECT_LE(again * 10, computed);
  RecordProperty("computed_again_percent", static_cast<int>(100 * again / computed));
}

TEST(RandomSchedules, AClientMayLeaveAtAnyStepAndNobodyElseNotices) {
  const int64_t window = 0;
  std::mt19937 random(1);
  const auto left = fake_prompt(21, random), stays = fake_prompt(13, random), waits = fake_prompt(9, random);
  // Waiting, in the middle of its prompt, between tokens, after its last one, and long after.
  for (int64_t leaves = 0; leaves < 14; ++leaves) {
    EngineCore core(std::make_unique<FakeRunner>(window, 4, 30, 8), {8, 16, /*max_batch=*/2});
    Clients clients(core);
    clients.add(0, stays, 20);
    clients.add(1, left, 4);
    clients.add(2, waits, 12);
    for (int64_t step = 0; !core.idle(); ++step) {
      if (step == leaves) {
        core.cancel(1);
        EXPECT_EQ(clients.ended[1].times, 1);  // at once
        core.check_integrity();
      }
      clients.step();
    }
    clients.expect_alone(0, 20, window);
    clients.expect_alone(2, 12, window);
    EXPECT_EQ(clients.ended[1].times, 1);
    EXPECT_EQ(core.stats().pages_in_use, 0);
  }
}

TEST_P(RandomSchedulesInFlight, NobodyStarvesWhileOthersKeepComing) {
  EngineCore core(std::make_unique<FakeRunner>(/*window=*/0, 4, /*num_pages=*/12, 8),
                  with_depth({8, 16, 4}, GetParam()));
  Clients clients(core);
  std::mt19937 random(2);
  int64_t added = 0;
  for (int64_t step = 0; step < 1000; ++step) {
    while (core.stats().waiting < 3) clients.add(added++, fake_prompt(10, random), 30);
    const int64_t before = core.stats().computed_tokens;
    clients.step();
    EXPECT_GT(core.stats().computed_tokens, before);
  }
  EXPECT_GT(core.stats().preemptions, 10);
  // First come, first served: at most those that run are overtaken.
  int64_t oldest = added, ended = 0;
  for (const auto& [id, end] : clients.ended) end.times ? ++ended : oldest = std::min(oldest, id);
  EXPECT_GT(ended, 25);
  EXPECT_GE(oldest, ended - 4);
  core.cancel_all();
  core.check_integrity();
}

// A key that may be NaN serves nobody else: not by its name, and not by its place.
TEST(RandomSchedules, AFailedRequestLeavesNothingInTheCache) {
  for (const auto& [nan, window] : {std::pair(false, 0), std::pair(true, 0), std::pair(true, 6)}) {
    auto owned = std::make_unique<FakeRunner>(window, 4, 10, 8);
    FakeRunner& runner = *owned;
    EngineCore core(std::move(owned), {8, 16, 4});
    Clients clients(core);
    runner.cache().keys(0).fill_(1);
    bool fails = false;
    runner.is_nan = [&, nan = nan] { return nan && fails; };
    runner.before_pass = [&, nan = nan] {
      if (!nan && fails) throw std::runtime_error("a fault");
    };
    const std::vector<int64_t> prompt(14, 1);
    clients.add(0, prompt, 9);
    clients.step();
    clients.step();
    EXPECT_EQ(core.stats().pages_in_use + core.stats().pages_cached, 4);  // with those behind the window
    fails = true;
    clients.step();
    fails = false;
    EXPECT_EQ(clients.ended[0].times, 1);
    EXPECT_EQ(core.stats().pages_in_use, 0);
    EXPECT_EQ(core.stats().pages_cached, 0);
    EXPECT_EQ(runner.cache().keys(0).narrow(0, 0, 4).abs().max().item<float>(), 0);
    clients.add(1, prompt, 9);
    while (!core.idle()) clients.step();
    EXPECT_EQ(core.stats().prefix_hits, 0);
    clients.expect_alone(1, 9, window);
  }
}

}  // namespace
}  // namespace mixtral
