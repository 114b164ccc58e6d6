// Log-probabilities of the tokens of a prompt.
#include <limits>

#include "generations.h"

namespace mixtral {
namespace {

SamplingParams with_prompt_logprobs(int64_t top) {
  SamplingParams out = params(3);
  out.prompt_logprobs = top;
  return out;
}

Engine engine_with_chunks(const Mixtral& model, int64_t chunk_size) {
  Engine::Options options;
  options.chunk_size = chunk_size;
  options.page_size = 4;
  return Engine(model, std::nullopt, options);
}

TEST(PromptLogprobs, AreTheLogSoftmaxOfTheRowsOfTheWholePrompt) {
  auto model = tiny_model(tiny_config());
  const auto prompt = random_ids(23, 101, 1);
  const torch::NoGradGuard no_grad;
  const auto expected = torch::log_softmax(model->logits(whole(model, prompt)).to(torch::kFloat64), 1);
  const auto result = engine_with_chunks(model, 512).generate({prompt}, {with_prompt_logprobs(4)})[0];
  ASSERT_EQ(result.prompt_logprobs.size(), prompt.size());
  EXPECT_FALSE(result.prompt_logprobs[0]);
  for (size_t i = 1; i < prompt.size(); ++i) {
    const TokenLogprob& found = result.prompt_logprobs[i].value();
    const auto row = expected[static_cast<int64_t>(i) - 1];
    EXPECT_EQ(found.token_id, prompt[i]);
    EXPECT_NEAR(found.logprob, row[prompt[i]].item<double>(), 1e-6);
    const auto [values, ids] = row.topk(4);
    ASSERT_EQ(found.top.size(), 4u);
    for (int64_t j = 0; j < 4; ++j) {
      EXPECT_EQ(found.top[static_cast<size_t>(j)].first, ids[j].item<int64_t>());
      EXPECT_NEAR(found.top[static_cast<size_t>(j)].second, values[j].item<double>(), 1e-6);
    }
  }
}

TEST(PromptLogprobs, DoNotDependOnChunksOrNeighboursAndChangeNoNewToken) {
  const auto model = tiny_model(tiny_config(), torch::kBFloat16);
  const auto prompts = some_prompts();
  const auto expected = engine_with_chunks(model, 512).generate(prompts, {with_prompt_logprobs(2)});
  for (size_t i = 0; i < prompts.size(); ++i) expect_same(expected[i], alone(model, prompts[i], params(3)));
  for (const int64_t chunk : {1, 4, 7}) {
    Engine engine = engine_with_chunks(model, chunk);
    // Every second request wants none, so that rows of both kinds share passes.
    for (const size_t wants : {0, 1}) {
      std::vector<SamplingParams> each;
      for (size_t i = 0; i < prompts.size(); ++i) each.push_back(i % 2 == wants ? with_prompt_logprobs(2) : params(3));
      const auto results = engine.generate(prompts, each);
      for (size_t i = 0; i < prompts.size(); ++i) {
        expect_same(results[i], expected[i]);
        ASSERT_EQ(results[i].prompt_logprobs.size(), i % 2 == wants ? prompts[i].size() : 0);
        for (size_t j = 1; j < results[i].prompt_logprobs.size(); ++j) {
          EXPECT_EQ(results[i].prompt_logprobs[j]->logprob, expected[i].prompt_logprobs[j]->logprob);
          EXPECT_EQ(results[i].prompt_logprobs[j]->top, expected[i].prompt_logprobs[j]->top);
        }
      }
    }
  }
}

TEST(PromptLogprobs, AreComputedThoughThePrefixIsCached) {
  Engine engine = engine_with_chunks(tiny_model(tiny_config()), 512);
  const auto prompt = random_ids(40, 101, 1);
  const auto first = engine.generate({prompt}, {with_prompt_logprobs(1)})[0];
  Timings timings;
  const auto again = engine.generate({prompt}, {with_prompt_logprobs(1)}, nullptr, &timings)[0];
  EXPECT_EQ(timings.cached_tokens, 0);
  ASSERT_EQ(again.prompt_logprobs.size(), 40u);
  for (size_t i = 1; i < 40; ++i) EXPECT_EQ(again.prompt_logprobs[i]->logprob, first.prompt_logprobs[i]->logprob);
}

TEST(PromptLogprobs, NanEndsTheRequestAndNotItsNeighbours) {
  auto model = tiny_model(tiny_config());
  const torch::NoGradGuard no_grad;
  model->named_parameters()["embed_tokens"][7].fill_(std::numeric_limits<float>::quiet_NaN());
  const auto results = engine_with_chunks(model, 2).generate({{1, 7, 2, 3, 4}, {3, 4}}, {with_prompt_logprobs(1)});
  EXPECT_EQ(results[0].finish_reason, "error");
  EXPECT_NE(results[0].error.find("nan"), std::string::npos);
  EXPECT_TRUE(results[0].token_ids.empty());
  expect_same(results[1], alone(model, {3, 4}, params(3)));
}

}  // namespace
}  // namespace mixtral
