// Prompts that begin alike: the same bits as without a prefix cache, and fewer tokens computed.
#include <fstream>

#include "generations.h"
#include "model/memory.h"

namespace mixtral {
namespace {

Engine::Options small_pages(const Mixtral& model, int64_t pages = 200) {
  Engine::Options options;
  options.page_size = 4;
  options.chunk_size = 10;
  options.kv_memory = pages * RollingKVCache::page_bytes(model->config(), 4, model->dtype());
  return options;
}

struct Turn {
  Generation generation;
  Timings timings;
};

Turn run(Engine& engine, const std::vector<int64_t>& prompt, const SamplingParams& sampling) {
  Turn turn;
  turn.generation = engine.generate({prompt}, {sampling}, nullptr, &turn.timings)[0];
  engine.check_integrity();
  return turn;
}

// The prompt of the next turn: the conversation so far and a message.
std::vector<int64_t> next_prompt(const Generation& last, uint64_t seed) {
  std::vector<int64_t> ids = last.prompt_token_ids;
  ids.insert(ids.end(), last.token_ids.begin(), last.token_ids.end());
  for (const int64_t id : random_ids(7, 101, seed)) ids.push_back(id);
  return ids;
}

TEST(PrefixCache, FiveTurnsHaveTheBitsOfFreshComputations) {
  for (const int64_t window : {0, 8, 64}) {
    const auto model = tiny_model(tiny_config(4, 2, window), torch::kBFloat16);
    Engine engine(model, std::nullopt, small_pages(model));
    std::vector<int64_t> prompt = random_ids(12, 101, 1);
    int64_t cached = 0;
    for (uint64_t turn = 0; turn < 5; ++turn) {
      const auto sampling = params(6, turn % 2 ? 1.0 : 0.0, turn);
      const auto [generation, timings] = run(engine, prompt, sampling);
      expect_same(generation, alone(model, prompt, sampling));
      EXPECT_EQ(timings.prompt_tokens, static_cast<int64_t>(prompt.size()));
      EXPECT_EQ(timings.cached_tokens, cached);
      // Nothing was computed from the last token.
      cached = (static_cast<int64_t>(prompt.size()) + 6 - 1) / 4 * 4;
      prompt = next_prompt(generation, 100 + turn);
    }
  }
}

TEST(PrefixCache, TheSamePromptComputesOnePageAgainAtMost) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine engine(model, std::nullopt, {});
  const auto prompt = random_ids(1024, 101, 1);
  const auto first = run(engine, prompt, params(3));
  const int64_t before = engine.stats().computed_tokens;
  const auto again = run(engine, prompt, params(3));
  EXPECT_EQ(engine.stats().computed_tokens - before, 16 + 2);
  EXPECT_EQ(again.timings.cached_tokens, 1024 - 16);
  EXPECT_EQ(engine.stats().prefix_queries, 2 * 1024);
  EXPECT_EQ(engine.stats().prefix_hits, 1024 - 16);
  expect_same(again.generation, first.generation);
}

TEST(PrefixCache, APromptThatDiffersGoesOnFromTheCommonPages) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine engine(model, std::nullopt, small_pages(model));
  const auto first = random_ids(30, 101, 1);
  run(engine, first, params(9));
  auto second = first;
  second[17] = (second[17] + 1) % 101;
  const auto changed = run(engine, second, params(9));
  EXPECT_EQ(changed.timings.cached_tokens, 16);
  expect_same(changed.generation, alone(model, second, params(9)));
  auto other = first;
  other[0] = (other[0] + 1) % 101;  // later pages have the same tokens, but not the same prefix
  const auto fresh = run(engine, other, params(9));
  EXPECT_EQ(fresh.timings.cached_tokens, 0);
  expect_same(fresh.generation, alone(model, other, params(9)));
}

TEST(PrefixCache, WithAWindowThePagesThatTheNextTokenSeesAreEnough) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/8));
  Engine engine(model, std::nullopt, small_pages(model, 7));  // of 15 pages of the sequence
  const auto prompt = random_ids(30, 101, 1);
  const auto first = run(engine, prompt, params(30));
  const auto longer = next_prompt(first.generation, 2);
  const auto next = run(engine, longer, params(5));
  EXPECT_EQ(next.timings.cached_tokens, 56);
  expect_same(next.generation, alone(model, longer, params(5)));
  const auto again = run(engine, prompt, params(30));  // these pages were taken
  EXPECT_EQ(again.timings.cached_tokens, 0);
  expect_same(again.generation, first.generation);
}

TEST(PrefixCache, ACancelledRequestLeavesWhatItComputed) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine engine(model, std::nullopt, small_pages(model));
  const auto prompt = random_ids(35, 101, 1);
  int passes = 0;
  const auto cancelled =
      engine.generate({prompt}, {params(9)}, [&](size_t, const std::string&) { return ++passes < 2; })[0];
  EXPECT_EQ(cancelled.finish_reason, "cancelled");
  const auto again = run(engine, prompt, params(9));
  EXPECT_EQ(again.timings.cached_tokens, 20);  // two chunks
  expect_same(again.generation, alone(model, prompt, params(9)));
}

TEST(PrefixCache, TheLeastRecentlyUsedGoesFirst) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine engine(model, std::nullopt, small_pages(model, 10));
  const auto a = random_ids(13, 101, 1), b = random_ids(13, 101, 2), c = random_ids(13, 101, 3);
  for (const auto& prompt : {a, b}) run(engine, prompt, params(1));  // three full pages each
  EXPECT_EQ(run(engine, a, params(1)).timings.cached_tokens, 12);
  expect_same(run(engine, c, params(1)).generation, alone(model, c, params(1)));
  run(engine, random_ids(13, 101, 4), params(1));
  EXPECT_EQ(run(engine, a, params(1)).timings.cached_tokens, 12);
  EXPECT_LT(run(engine, b, params(1)).timings.cached_tokens, 12);
}

// Other numbers of experts make other keys; a trace has a row for every token; replayed keys are the trace's own.
TEST(PrefixCache, OnlyKeysOfTheSameKindAreShared) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine engine(model, std::nullopt, small_pages(model));
  const auto prompt = random_ids(22, 101, 1);
  const auto plain = run(engine, prompt, params(4));
  const auto cached = [&](const Request& request) {
    Timings timings;
    const auto generation = engine.generate({request}, nullptr, &timings)[0];
    if (request.experts_per_token != 1) expect_same(generation, plain.generation);
    return std::make_pair(timings.cached_tokens, generation);
  };
  EXPECT_EQ(cached({prompt, params(4), /*experts_per_token=*/1}).first, 0);
  EXPECT_EQ(cached({prompt, params(4), /*experts_per_token=*/1}).first, 20);
  const auto traced = cached({prompt, params(4), 0, /*trace=*/true});
  EXPECT_EQ(traced.first, 0);
  EXPECT_EQ(traced.second.trace->tokens(), 22 + 3);
  EXPECT_EQ(cached({prompt, params(4), 0, false, traced.second.trace}).first, 0);
  EXPECT_EQ(cached({prompt, params(4)}).first, 20);
}

TEST(PrefixCache, CanBeSwitchedOff) {
  const auto model = tiny_model(tiny_config());
  Engine::Options options = small_pages(model);
  options.prefix_cache = false;
  Engine engine(model, std::nullopt, options);
  const auto prompt = random_ids(30, 101, 1);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(run(engine, prompt, params(4)).timings.cached_tokens, 0);
  EXPECT_EQ(engine.stats().pages_cached, 0);
}

// A pool for two, and eight requests that trace, replay, and sample: preempted ones end as if they had been alone.
TEST(PrefixCache, PreemptedRequestsHaveTheBitsOfUndisturbedOnes) {
  for (const int64_t window : {0, 8}) {
    const auto model = tiny_model(tiny_config(4, 2, window), torch::kBFloat16);
    Engine::Options options = small_pages(model, window ? 12 : 30);
    Engine roomy(model, std::nullopt, small_pages(model)), tight(model, std::nullopt, options);
    std::vector<Request> requests;
    for (uint64_t i = 0; i < 8; ++i) {
      Request request{random_ids(5 + 4 * static_cast<int64_t>(i % 5), 101, i), params(35, i % 2 ? 1.0 : 0.0, i)};
      request.trace = i % 3 == 0;
      request.experts_per_token = i == 4 ? 1 : 0;
      if (i == 5) {
        Request traced = request;
        traced.trace = true;
        traced.params.seed = 99;  // so it parts from the trace at some token
        request.replay = roomy.generate({traced})[0].trace;
      }
      requests.push_back(std::move(request));
    }
    const auto together = tight.generate(requests);
    EXPECT_GT(tight.stats().preemptions, 0);
    tight.check_integrity();
    for (size_t i = 0; i < requests.size(); ++i) {
      const auto expected = roomy.generate({requests[i]})[0];
      expect_same(together[i], expected);
      ASSERT_EQ(together[i].trace != nullptr, expected.trace != nullptr);
      if (!expected.trace) continue;
      EXPECT_EQ(together[i].trace->token_id, expected.trace->token_id);
      EXPECT_EQ(together[i].trace->position, expected.trace->position);
      EXPECT_EQ(together[i].trace->predicted_id, expected.trace->predicted_id);
      EXPECT_EQ(together[i].trace->routing.topk_ids, expected.trace->routing.topk_ids);
      EXPECT_EQ(together[i].trace->routing.topk_weights, expected.trace->routing.topk_weights);
    }
  }
}

TEST(PrefixCache, TenThousandTokensBehindAWindowStayInTheSamePagesAndBits) {
  Config config = tiny_config(4, 2, /*window=*/64);
  config.max_position = 16384;
  auto model = tiny_model(config);
  Engine engine(model, std::nullopt, {});
  const auto prompt = random_ids(100, 101, 1);
  Timings timings;
  int64_t pages = 0, tokens = 0;
  const auto watch = [&](size_t, const std::string&) {
    if (++tokens > 200) EXPECT_LE(engine.stats().pages_in_use, 5);  // ceil(64 / 16) + 1
    pages = std::max(pages, engine.stats().pages_in_use);
    return true;
  };
  const auto result = engine.generate({prompt}, {params(10000, 1.0)}, watch, &timings)[0];
  ASSERT_EQ(result.token_ids.size(), 10000u);
  EXPECT_EQ(timings.peak_pages, pages);
  EXPECT_LE(pages, (63 + 100 + 15) / 16 + 1);
  // The whole sequence at once, without a cache.
  std::vector<int64_t> ids = prompt;
  ids.insert(ids.end(), result.token_ids.begin(), result.token_ids.end() - 1);
  const torch::NoGradGuard no_grad;
  const auto hidden = whole(model, ids);
  for (size_t i = 0; i < result.token_ids.size(); i += 97) {
    const auto logits = model->logits(hidden.narrow(0, 99 + static_cast<int64_t>(i), 1));
    const auto expected = token_logprob(logits.data_ptr<float>(), 101, result.token_ids[i], 0);
    ASSERT_EQ(result.logprobs[i].logprob, expected.logprob) << "token " << i;
  }
}

// ---- prompt cache files

TEST(PrefixCache, AFileTakesItToAnotherEngine) {
  for (const int64_t window : {0, 8}) {
    const auto model = tiny_model(tiny_config(4, 2, window));
    const auto file = std::filesystem::path(::testing::TempDir()) / "prefix.cache";
    const auto prompt = random_ids(30, 101, 1);
    Engine first(model, std::nullopt, small_pages(model)), second(model, std::nullopt, small_pages(model));
    const auto turn = run(first, prompt, params(9));
    const auto longer = next_prompt(turn.generation, 5);
    first.save_prompt_cache(longer, file);
    second.load_prompt_cache(file);
    second.load_prompt_cache(file);  // what is there already is not kept twice
    second.check_integrity();
    EXPECT_EQ(second.stats().pages_cached, window ? 2 : 9);
    const auto next = run(second, longer, params(9));
    EXPECT_EQ(next.timings.cached_tokens, 36);  // of 38 that were computed
    expect_same(next.generation, alone(model, longer, params(9)));

    first.save_prompt_cache({1, 2, 3}, file);  // less than a page: nothing
    second.load_prompt_cache(file);
    Engine small(model, std::nullopt, small_pages(model, window ? 1 : 8));
    first.save_prompt_cache(longer, file);
    EXPECT_THROW(small.load_prompt_cache(file), OutOfMemory);
    small.check_integrity();
    std::filesystem::remove(file);
  }
}

}  // namespace
}  // namespace mixtral
