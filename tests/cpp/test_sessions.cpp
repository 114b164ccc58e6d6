// Conversations whose keys and values stay in the cache: the same bits as without, and fewer tokens computed.
#include "generations.h"

namespace mixtral {
namespace {

Engine::Options small_pages(int64_t kv_memory = 0) {
  Engine::Options options;
  options.page_size = 4;
  options.chunk_size = 10;
  options.kv_memory = kv_memory;
  return options;
}

struct Turn {
  Generation generation;
  Timings timings;
};

Turn run(Engine& engine, const std::vector<int64_t>& prompt, const SamplingParams& sampling,
         const std::string& session) {
  Turn turn;
  turn.generation = engine.generate({{prompt, sampling, session}}, nullptr, &turn.timings)[0];
  return turn;
}

// The prompt of the next turn: the conversation so far and a message.
std::vector<int64_t> next_prompt(const Generation& last, uint64_t seed) {
  std::vector<int64_t> ids = last.prompt_token_ids;
  ids.insert(ids.end(), last.token_ids.begin(), last.token_ids.end());
  for (const int64_t id : random_ids(7, 101, seed)) ids.push_back(id);
  return ids;
}

TEST(Sessions, FiveTurnsHaveTheBitsOfFreshComputations) {
  for (const int64_t window : {0, 8, 64}) {
    const auto model = tiny_model(tiny_config(4, 2, window), torch::kBFloat16);
    Engine engine(model, std::nullopt, small_pages());
    std::vector<int64_t> prompt = random_ids(12, 101, 1);
    int64_t cached = 0;
    for (uint64_t turn = 0; turn < 5; ++turn) {
      const auto sampling = params(6, turn % 2 ? 1.0 : 0.0, turn);
      const auto [generation, timings] = run(engine, prompt, sampling, "chat");
      expect_same(generation, alone(model, prompt, sampling));
      EXPECT_EQ(timings.prompt_tokens, static_cast<int64_t>(prompt.size()));
      EXPECT_EQ(timings.cached_tokens, cached);
      cached = static_cast<int64_t>(prompt.size()) + 6 - 1;  // but for the last token, which nothing was computed from
      prompt = next_prompt(generation, 100 + turn);
    }
  }
}

TEST(Sessions, AnotherPromptReusesTheCommonPrefix) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine engine(model, std::nullopt, small_pages());
  const auto first = random_ids(30, 101, 1);
  run(engine, first, params(9), "a");
  auto second = first;
  second[17] = (second[17] + 1) % 101;
  const auto changed = run(engine, second, params(9), "a");
  EXPECT_EQ(changed.timings.cached_tokens, 17);
  expect_same(changed.generation, alone(model, second, params(9)));
  // The very same prompt again: its last token is computed, for the logits.
  EXPECT_EQ(run(engine, second, params(9), "a").timings.cached_tokens, 29);
  EXPECT_EQ(run(engine, second, params(9), "b").timings.cached_tokens, 0);
  EXPECT_EQ(run(engine, second, params(9), "").timings.cached_tokens, 0);
  const auto shorter = std::vector<int64_t>(second.begin(), second.begin() + 5);
  const auto cut = run(engine, shorter, params(40), "a");
  EXPECT_EQ(cut.timings.cached_tokens, 4);
  expect_same(cut.generation, alone(model, shorter, params(40)));
}

TEST(Sessions, WhatTheWindowHasLeftBehindIsComputedAnew) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/8));
  Engine engine(model, std::nullopt, small_pages());
  const auto first = random_ids(30, 101, 1);
  run(engine, first, params(30), "a");
  const auto again = run(engine, first, params(30), "a");
  EXPECT_EQ(again.timings.cached_tokens, 0);
  expect_same(again.generation, alone(model, first, params(30)));
}

TEST(Sessions, ACancelledRequestLeavesWhatItComputed) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine engine(model, std::nullopt, small_pages());
  const auto prompt = random_ids(35, 101, 1);
  int passes = 0;
  const auto cancelled =
      engine.generate({{prompt, params(9), "a"}}, [&](size_t, const std::string&) { return ++passes < 2; })[0];
  EXPECT_EQ(cancelled.finish_reason, "cancelled");
  const auto again = run(engine, prompt, params(9), "a");
  EXPECT_EQ(again.timings.cached_tokens, 20);  // two chunks
  expect_same(again.generation, alone(model, prompt, params(9)));
}

// Bytes of `pages` pages of four tokens.
int64_t page_bytes(const Mixtral& model, int64_t pages) {
  return pages * RollingKVCache::page_bytes(model->config(), 4, model->dtype());
}

TEST(Sessions, TheOldestIdleOneIsDroppedWhenARequestNeedsItsPages) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine engine(model, std::nullopt, small_pages(page_bytes(model, 10)));
  const auto prompt = random_ids(12, 101, 1);
  for (const char* name : {"a", "b"}) run(engine, prompt, params(4), name);  // four pages each
  EXPECT_EQ(run(engine, prompt, params(4), "b").timings.cached_tokens, 11);
  EXPECT_EQ(run(engine, prompt, params(4), "a").timings.cached_tokens, 11);
  expect_same(run(engine, prompt, params(4), "").generation, alone(model, prompt, params(4)));  // drops b
  EXPECT_EQ(run(engine, prompt, params(4), "a").timings.cached_tokens, 11);
  EXPECT_EQ(run(engine, prompt, params(4), "b").timings.cached_tokens, 0);
  // As large as the pool: all sessions go.
  const auto large = random_ids(30, 101, 2);
  expect_same(run(engine, large, params(10), "").generation, alone(model, large, params(10)));
  EXPECT_EQ(run(engine, prompt, params(4), "b").timings.cached_tokens, 0);
}

TEST(Sessions, AreAsManyAsSequencesAtATimeAtMost) {
  Engine::Options options = small_pages();
  options.max_batch = 2;
  Engine engine(tiny_model(tiny_config()), std::nullopt, options);
  for (const char* name : {"a", "b", "c"}) run(engine, {1, 2, 3}, params(2), name);
  EXPECT_EQ(run(engine, {1, 2, 3}, params(2), "b").timings.cached_tokens, 2);
  EXPECT_EQ(run(engine, {1, 2, 3}, params(2), "a").timings.cached_tokens, 0);
}

TEST(Sessions, TwoRequestsOfOneSessionAtATimeAreComputedApart) {
  const auto model = tiny_model(tiny_config());
  Engine engine(model, std::nullopt, small_pages());
  const auto a = random_ids(20, 101, 1), b = random_ids(25, 101, 2);
  const auto results = engine.generate({{a, params(9), "s"}, {b, params(12), "s"}});
  expect_same(results[0], alone(model, a, params(9)));
  expect_same(results[1], alone(model, b, params(12)));
  const auto next = next_prompt(results[1], 3);  // the one that ended last
  const auto turn = run(engine, next, params(5), "s");
  EXPECT_EQ(turn.timings.cached_tokens, 25 + 12 - 1);
  expect_same(turn.generation, alone(model, next, params(5)));
}

}  // namespace
}  // namespace mixtral
