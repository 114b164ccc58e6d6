#include <array>
#include <filesystem>
#include <limits>

#include "generations.h"

namespace mixtral {
namespace {

// Every generated token's logprob equals the one that a single pass over the whole text gives.
void expect_rescored(Mixtral& model, const Generation& result) {
  std::vector<int64_t> ids = result.prompt_token_ids;
  ids.insert(ids.end(), result.token_ids.begin(), result.token_ids.end());
  const auto logits = model->forward(torch::tensor(ids, torch::kInt64).unsqueeze(0))[0];
  ASSERT_EQ(result.logprobs.size(), result.token_ids.size());
  for (size_t i = 0; i < result.token_ids.size(); ++i) {
    const auto row = logits[static_cast<int64_t>(result.prompt_token_ids.size() + i) - 1];
    const auto expected = token_logprob(row.data_ptr<float>(), row.size(0), result.token_ids[i], 2);
    ASSERT_EQ(result.logprobs[i].logprob, expected.logprob) << "token " << i;
    ASSERT_EQ(result.logprobs[i].top, expected.top) << "token " << i;
  }
}

std::string error_of(Engine& engine, const Prompts& prompts, const SamplingParams& sampling) {
  try {
    engine.generate(prompts, {sampling});
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(Engine, NeitherChunksNorNeighboursNorBatchLimitsChangeAResult) {
  const auto packable = tiny_model(packable_config(), torch::kBFloat16);
  for (auto& model : {tiny_model(tiny_config()), tiny_model(tiny_config(), torch::kBFloat16),
                      packed_model(packable, Packing::kFloat), packed_model(packable, Packing::kInt4)}) {
    const Prompts prompts = some_prompts();
    const std::vector<SamplingParams> sampling = {params(20), params(9, 1.0, 5), params(15, 0.7, 6)};
    std::vector<Generation> alone;
    for (size_t i = 0; i < prompts.size(); ++i)
      alone.push_back(Engine(model, std::nullopt, {}).generate({prompts[i]}, {sampling[i]})[0]);
    // chunk size, token budget, batch limit
    const std::vector<std::array<int64_t, 3>> limits = {{1, 2048, 64}, {3, 2048, 64}, {7, 2048, 64},
                                                        {8, 2048, 64}, {9, 2048, 64}, {512, 2048, 64},
                                                        {512, 1, 64},  {512, 5, 2},   {3, 5, 1}};
    for (const auto& [chunk, token_budget, max_batch] : limits) {
      Engine::Options options;
      options.chunk_size = chunk;
      options.token_budget = token_budget;
      options.max_batch = max_batch;
      options.page_size = 4;
      const auto together = Engine(model, std::nullopt, options).generate(prompts, sampling);
      for (size_t i = 0; i < prompts.size(); ++i) expect_same(together[i], alone[i]);
    }
  }
}

TEST(Engine, GreedyTakesTheMostLikelyTokenOfTheWholeText) {
  auto model = tiny_model(tiny_config());
  const auto result = Engine(model, std::nullopt, {}).generate({random_ids(13, 101, 1)}, {params(20)})[0];
  EXPECT_EQ(result.finish_reason, "length");
  EXPECT_EQ(result.token_ids.size(), 20u);
  std::vector<int64_t> ids = result.prompt_token_ids;
  for (const int64_t id : result.token_ids) {
    EXPECT_EQ(model->forward(torch::tensor(ids, torch::kInt64).unsqueeze(0))[0][-1].argmax().item<int64_t>(), id);
    ids.push_back(id);
  }
}

TEST(Engine, RescoredEqualsGenerated) {
  for (const int64_t experts : {0, 8})
    for (const auto dtype : {torch::kFloat32, torch::kBFloat16}) {
      auto model = tiny_model(tiny_config(experts, 2, 8), dtype);
      for (const auto& result : Engine(model, std::nullopt, {}).generate(some_prompts(), {params(40, 1.0)}))
        expect_rescored(model, result);
    }
}

TEST(Engine, FiftyWindowsOfTextNeedTheMemoryOfOne) {
  auto model = tiny_model(tiny_config(4, 2, /*window=*/64));
  Engine::Options options;
  options.chunk_size = 10;
  Timings timings;
  const auto result = Engine(model, std::nullopt, options)
                          .generate({random_ids(100, 101, 1)}, {params(50 * 64, 1.0)}, nullptr, &timings)[0];
  EXPECT_LE(timings.peak_pages, (64 - 1 + 10 + 15) / 16 + 1);
  EXPECT_EQ(timings.prompt_tokens, 100);
  EXPECT_EQ(timings.new_tokens, 50 * 64);
  expect_rescored(model, result);
}

TEST(Engine, StopsAtEndOfSequenceUnlessToldToIgnoreIt) {
  Config config = tiny_config();
  const auto prompt = random_ids(13, 101, 1);
  const auto free_run = Engine(tiny_model(config), std::nullopt, {}).generate({prompt}, {params(20)})[0];
  // Whatever the model says third is declared one of two ends of sequence.
  const int64_t end = free_run.token_ids[2];
  const auto first = std::find(free_run.token_ids.begin(), free_run.token_ids.end(), end);
  config.eos_token_ids = {100, end};
  Engine engine(tiny_model(config), std::nullopt, {});
  auto sampling = params(20);
  expect_same(engine.generate({prompt}, {sampling})[0], free_run);
  sampling.ignore_eos = false;
  const auto stopped = engine.generate({prompt, prompt}, {sampling, params(20)});
  EXPECT_EQ(stopped[0].token_ids, std::vector<int64_t>(free_run.token_ids.begin(), first));
  EXPECT_EQ(stopped[0].logprobs.size(), stopped[0].token_ids.size());
  EXPECT_EQ(stopped[0].finish_reason, "stop");
  expect_same(stopped[1], free_run);
}

TEST(Engine, CallbackSeesEveryStepAndMayCancel) {
  Engine::Options options;
  options.chunk_size = 4;
  Engine engine(tiny_model(tiny_config()), std::nullopt, options);
  std::vector<size_t> calls(3);
  const auto count = [&](size_t index, const std::string& piece) {
    EXPECT_EQ(piece, "");
    ++calls[index];
    return true;
  };
  engine.generate(some_prompts(), {params(5)}, count);
  EXPECT_EQ(calls, (std::vector<size_t>{3 + 5, 5, 7 + 5}));  // 13, 1 and 30 prompt tokens in chunks of 4

  int left = 2;  // the second callback of prompt 0 cancels it, and it alone
  const auto results = engine.generate(some_prompts(), {params(5)},
                                       [&](size_t index, const std::string&) { return index != 0 || --left > 0; });
  EXPECT_EQ(left, 0);
  EXPECT_EQ(results[0].finish_reason, "cancelled");
  EXPECT_EQ(results[1].finish_reason, "length");
  EXPECT_EQ(results[2].finish_reason, "length");
  EXPECT_EQ(results[2].token_ids.size(), 5u);
}

TEST(Engine, ABudgetIsSharedByAllSequencesOfAPass) {
  Engine::Options options;
  options.token_budget = 5;
  Engine engine(tiny_model(tiny_config()), std::nullopt, options);
  std::vector<size_t> calls(2);
  engine.generate({random_ids(3, 101, 1), random_ids(5, 101, 2)}, {params(4)}, [&](size_t index, const std::string&) {
    ++calls[index];
    return true;
  });
  // The first pass has room for two tokens of the second prompt, the next one for the rest.
  EXPECT_EQ(calls, (std::vector<size_t>{4, 1 + 4}));
}

TEST(Engine, APromptLongerThanThoseBeforeItFindsPages) {
  auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  const Prompts prompts = {random_ids(1, 101, 1), random_ids(200, 101, 2)};
  Engine::Options options;
  options.max_batch = 1;
  const auto results = Engine(model, std::nullopt, options).generate(prompts, {params(3)});
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(results[i].finish_reason, "length");
    expect_same(results[i], alone(model, prompts[i], params(3)));
  }
}

TEST(Engine, NanLogitsFailOneRequestAlone) {
  auto model = tiny_model(tiny_config());
  const auto expected = Engine(model, std::nullopt, {}).generate({random_ids(13, 50, 1)}, {params(3)})[0];
  const torch::NoGradGuard no_grad;
  model->named_parameters()["embed_tokens"][99].fill_(std::numeric_limits<float>::quiet_NaN());
  const auto results = Engine(model, std::nullopt, {}).generate({{1, 99}, random_ids(13, 50, 1)}, {params(3)});
  EXPECT_EQ(results[0].finish_reason, "error");
  EXPECT_NE(results[0].error, "");
  EXPECT_TRUE(results[0].token_ids.empty());
  expect_same(results[1], expected);
}

TEST(Engine, RejectsWhatItCannotServe) {
  Engine::Options options;
  options.ctx_size = 20;
  Engine engine(tiny_model(tiny_config()), std::nullopt, options);
  EXPECT_EQ(error_of(engine, {{1}, {}}, params(5)), "prompt must not be empty");
  EXPECT_EQ(error_of(engine, {{1, 101}}, params(5)), "Mixtral: token ids must be in [0, 101), got 101 at index 1");
  EXPECT_EQ(error_of(engine, {random_ids(16, 101, 1)}, params(5)),
            "prompt must fit the context of 20 tokens with max_tokens, got 16 prompt tokens and max_tokens 5");
  EXPECT_NE(error_of(engine, {{1}}, params(std::numeric_limits<int64_t>::max())), "");
  EXPECT_NE(error_of(engine, {{1}}, params(0)), "");
  auto with_stop = params(5);
  with_stop.stop = {"x"};
  EXPECT_EQ(error_of(engine, {{1}}, with_stop), "stop must be empty without a tokenizer, got 1 strings");
  EXPECT_EQ(engine.generate({random_ids(15, 101, 1)}, {params(5)})[0].token_ids.size(), 5u);
  EXPECT_TRUE(engine.generate({}, {params(5)}).empty());
  EXPECT_THROW(engine.generate({{1}}, {params(5), params(5)}), std::invalid_argument);
  options.chunk_size = 0;
  EXPECT_THROW(Engine(tiny_model(tiny_config()), std::nullopt, options), std::invalid_argument);
}

// ---- with the demo tokenizer
// -----------------------------------------------------------------------------------------

class EngineText : public ::testing::Test {
 protected:
  EngineText() : tokenizer(std::filesystem::path(MIXTRAL_SOURCE_DIR) / "models/demo") {
    Config config = tiny_config();
    config.vocab_size = tokenizer.vocab_size();
    model = tiny_model(config);
  }
  // What `ids` add to the text of `prompt`, the space between the two included.
  std::string continued(std::vector<int64_t> prompt, const std::vector<int64_t>& ids) const {
    const size_t begin = tokenizer.decode(prompt).size();
    prompt.insert(prompt.end(), ids.begin(), ids.end());
    return tokenizer.decode(prompt).substr(begin);
  }

  Tokenizer tokenizer;
  Mixtral model{nullptr};
};

// The text continues the prompt: both together are the decoding of all ids, the space between them included.
std::string continuation(const Tokenizer& tokenizer, std::vector<int64_t> prompt, const std::vector<int64_t>& ids) {
  const size_t length = tokenizer.decode(prompt).size();
  prompt.insert(prompt.end(), ids.begin(), ids.end());
  return tokenizer.decode(prompt).substr(length);
}

TEST_F(EngineText, StreamedPiecesAreTheText) {
  const Prompts prompts = {tokenizer.encode("Once upon", true), tokenizer.encode("a", true)};
  std::vector<std::string> streamed(2);
  const auto results =
      Engine(model, tokenizer, {}).generate(prompts, {params(60, 1.0)}, [&](size_t i, const std::string& p) {
        streamed[i] += p;
        return true;
      });
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(results[i].text, continuation(tokenizer, prompts[i], results[i].token_ids));
    EXPECT_EQ(results[i].text, streamed[i]);
    EXPECT_GT(results[i].text.size(), 60u);
  }
}

TEST_F(EngineText, TextEndsBeforeAStopString) {
  Engine engine(model, tokenizer, {});
  const auto prompt = tokenizer.encode("Once upon", true);
  const auto free_run = engine.generate({prompt}, {params(60, 1.0)})[0];
  auto sampling = params(60, 1.0);
  sampling.stop = {free_run.text.substr(free_run.text.size() / 2, 3)};
  std::string streamed;
  const auto stopped = engine.generate({prompt}, {sampling}, [&](size_t, const std::string& piece) {
    streamed += piece;
    return true;
  })[0];
  EXPECT_EQ(stopped.finish_reason, "stop");
  EXPECT_EQ(stopped.text, free_run.text.substr(0, free_run.text.find(sampling.stop[0])));
  EXPECT_EQ(stopped.text, streamed);
  EXPECT_LT(stopped.token_ids.size(), free_run.token_ids.size());
}

TEST_F(EngineText, IdsBeyondTheTokenizerHaveNoText) {
  Config config = tiny_config();
  config.vocab_size = 8 * tokenizer.vocab_size();
  const auto prompt = tokenizer.encode("a", true);
  const auto result = Engine(tiny_model(config), tokenizer, {}).generate({prompt}, {params(20, 5.0)})[0];
  EXPECT_EQ(result.finish_reason, "length");
  std::vector<int64_t> known;
  for (const int64_t id : result.token_ids)
    if (id < tokenizer.vocab_size()) known.push_back(id);
  EXPECT_LT(known.size(), 20u);
  EXPECT_EQ(result.text, continuation(tokenizer, prompt, known));
}

}  // namespace
}  // namespace mixtral
