// What happens inside a step: requests of different kinds in one forward pass, guessed tokens, and faults.
#include <ATen/record_function.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <future>
#include <limits>
#include <new>

#include "engine/engine_core.h"
#include "engine/errors.h"
#include "engine/model_runner.h"
#include "generations.h"

namespace mixtral {
namespace {

Request with_experts(std::vector<int64_t> prompt, int64_t experts, const SamplingParams& sampling) {
  Request request{std::move(prompt), sampling};
  request.experts_per_token = experts;
  request.trace = true;
  return request;
}

std::vector<Request> requests_of_all_numbers(const SamplingParams& sampling) {
  std::vector<Request> requests;
  for (const int64_t experts : {1, 4, 2, 3, 2})
    requests.push_back(with_experts(random_ids(9 + experts, 101, 10 + requests.size()), experts, sampling));
  return requests;
}

void expect_same_routing(const Generation& a, const Generation& b) {
  EXPECT_EQ(a.trace->routing.topk_ids, b.trace->routing.topk_ids);
  EXPECT_EQ(a.trace->routing.topk_weights, b.trace->routing.topk_weights);
  EXPECT_EQ(a.trace->predicted_id, b.trace->predicted_id);
}

TEST(EngineSteps, RequestsWithDifferentNumbersOfExpertsGetWhatEachGetsAlone) {
  const auto packable = tiny_model(packable_config(), torch::kBFloat16);
  for (auto& model : {tiny_model(tiny_config()), tiny_model(tiny_config(), torch::kBFloat16),
                      packed_model(packable, Packing::kFloat), packed_model(packable, Packing::kInt4)}) {
    const auto requests = requests_of_all_numbers(params(12, 0.9, 3));
    Engine::Options options;
    options.chunk_size = 4;
    const auto together = Engine(model, std::nullopt, options).generate(requests);
    for (size_t i = 0; i < requests.size(); ++i) {
      const auto alone = Engine(model, std::nullopt, {}).generate({requests[i]})[0];
      expect_same(together[i], alone);
      expect_same_routing(together[i], alone);
    }
  }
}

// Forced experts, some of them not the router's own, beside requests with other numbers.
TEST(EngineSteps, ReplaysGoWithRequestsOfOtherNumbersOfExperts) {
  const auto model = tiny_model(tiny_config());
  auto requests = requests_of_all_numbers(params(8));
  for (size_t i = 0; i < requests.size(); i += 2) {
    auto trace = *Engine(model, std::nullopt, {}).generate({requests[i]})[0].trace;
    for (size_t place = 0; i > 0 && place < trace.routing.topk_ids.size(); place += 2 * trace.routing.top_k)
      std::swap(trace.routing.topk_ids[place], trace.routing.topk_ids[place + trace.routing.top_k - 1]);
    trace.model = trace_fingerprint(*model);
    requests[i].replay = std::make_shared<Trace>(std::move(trace));
  }
  const auto together = Engine(model, std::nullopt, {}).generate(requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto alone = Engine(model, std::nullopt, {}).generate({requests[i]})[0];
    expect_same(together[i], alone);
    expect_same_routing(together[i], alone);
  }
}

TEST(EngineSteps, RequestsWithDifferentNumbersOfExpertsShareOnePass) {
  static std::atomic<int64_t> layers{0};
  layers = 0;
  const auto handle = at::addGlobalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
        if (std::string(function.name()) == "mixtral::moe_mlp") ++layers;
        return nullptr;
      }).scopes({at::RecordScope::FUNCTION}));
  std::vector<Request> requests;
  for (const int64_t experts : {1, 2, 4}) requests.push_back(with_experts({5, 6, 7}, experts, params(5)));
  Engine(tiny_model(tiny_config()), std::nullopt, {}).generate(requests);
  at::removeCallback(handle);
  EXPECT_EQ(layers, 5 * tiny_config().num_layers);
}

// ---- guessed tokens
// ----------------------------------------------------------------------------------------------------------

// Texts that repeat themselves, of several lengths, some of them shorter than a page.
Prompts repeating_prompts(size_t count) {
  Prompts prompts;
  for (size_t i = 0; i < count; ++i) {
    const auto piece = random_ids(1 + static_cast<int64_t>(i % 11), 101, 1000 + i);
    prompts.emplace_back();
    for (size_t n = 0; n <= 1 + i % 4; ++n) prompts[i].insert(prompts[i].end(), piece.begin(), piece.end());
  }
  return prompts;
}

// Returns the guesses that were made and those that held.
std::pair<int64_t, int64_t> expect_same_with_and_without_guesses(const Mixtral& model, size_t count, double temperature,
                                                                 bool prefix_cache) {
  Engine::Options options;
  options.page_size = 4;
  options.prefix_cache = prefix_cache;
  std::vector<Request> requests;
  for (const auto& prompt : repeating_prompts(count)) {
    requests.push_back({prompt, params(30, temperature, 7 + requests.size())});
    if (requests.size() % 3 == 0 && model->config().is_moe()) requests.back().experts_per_token = 1;
    if (requests.size() % 5 == 0) requests.back().params.repetition_penalty = 1.1;
    if (requests.size() % 7 == 0) requests.back().params.max_tokens = 4;
  }
  Engine plain_engine(model, std::nullopt, options);
  const auto plain = plain_engine.generate(requests);
  options.speculate = 8;
  Engine engine(model, std::nullopt, options);
  Timings timings;
  const auto guessed = engine.generate(requests, nullptr, &timings);
  for (size_t i = 0; i < count; ++i) expect_same(guessed[i], plain[i]);
  if (model->config().is_moe() && !prefix_cache) {
    EXPECT_EQ(engine.routing_counts()->tokens, plain_engine.routing_counts()->tokens);
    EXPECT_EQ(engine.routing_counts()->chosen, plain_engine.routing_counts()->chosen);
  }
  return {timings.drafted_tokens, timings.accepted_tokens};
}

TEST(EngineSteps, GuessesChangeNoTokenAndNoLogprob) {
  for (const double temperature : {0.0, 0.8}) {
    const auto [drafted, accepted] =
        expect_same_with_and_without_guesses(tiny_model(tiny_config()), 200, temperature, true);
    EXPECT_GT(accepted, 0);
    EXPECT_GT(drafted, accepted);
  }
}

TEST(EngineSteps, GuessesChangeNoBitInAnyFormatOrWindow) {
  const auto packable = tiny_model(packable_config(4, 2, /*window=*/0), torch::kBFloat16);
  for (auto& model : {tiny_model(tiny_config(4, 2, /*window=*/1)), tiny_model(tiny_config(0, 0, /*window=*/30)),
                      packed_model(packable, Packing::kFloat), packed_model(packable, Packing::kInt4)})
    EXPECT_GT(expect_same_with_and_without_guesses(model, 20, 0, false).second, 0);
}

// A guess that holds may be the end: by a token or by the number of tokens.
TEST(EngineSteps, AGuessedTokenEndsARequest) {
  Config config = tiny_config();
  const auto prompts = repeating_prompts(40);
  const auto free_run = Engine(tiny_model(config), std::nullopt, {}).generate(prompts, {params(40)});
  auto sampling = params(40);
  sampling.ignore_eos = false;
  for (const size_t place : {20, 25, 33}) {
    config.eos_token_ids = {free_run[3].token_ids[place]};
    const auto model = tiny_model(config);
    Engine::Options options;
    const auto plain = Engine(model, std::nullopt, options).generate(prompts, {sampling});
    options.speculate = 8;
    Engine engine(model, std::nullopt, options);
    const auto guessed = engine.generate(prompts, {sampling});
    for (size_t i = 0; i < prompts.size(); ++i) expect_same(guessed[i], plain[i]);
    Timings timings;
    engine.generate({{1}}, {params(1)}, nullptr, &timings);
    EXPECT_EQ(timings.peak_pages, 1);
  }
}

// ---- faults
// ----------------------------------------------------------------------------------------------------------

// While it lives, an allocation of torch on the CPU above `limit` bytes throws.
class LimitedMemory : public c10::Allocator {
 public:
  LimitedMemory() { c10::SetCPUAllocator(this, 255); }
  ~LimitedMemory() override { c10::SetCPUAllocator(inner_, 255); }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes > limit) throw std::bad_alloc();
    return inner_->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return inner_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  std::atomic<size_t> limit{std::numeric_limits<size_t>::max()};

 private:
  c10::Allocator* const inner_ = c10::GetCPUAllocator();
};

class EngineFaults : public ::testing::Test {
 protected:
  // Bytes of the logits of `rows` rows: the largest tensor of a decoding pass.
  static size_t logits_bytes(size_t rows) { return rows * 101 * sizeof(float); }

  // Submits a request that calls `at_token` after its second pass, and returns its end.
  std::future<Outcome> submit(Engine& engine, const std::vector<int64_t>& prompt, std::function<void()> at_token) {
    const auto ended = std::make_shared<std::promise<Outcome>>();
    const auto passes = std::make_shared<int>(0);
    Callbacks callbacks;
    callbacks.on_progress = [=](const GenerationProgress&) {
      if (++*passes == 2 && at_token) at_token();
      return true;
    };
    callbacks.on_end = [ended](Outcome outcome) { ended->set_value(std::move(outcome)); };
    engine.submit({prompt, params(10, 1.0)}, std::move(callbacks));
    return ended->get_future();
  }

  static Outcome wait(std::future<Outcome>& end) {
    if (end.wait_for(std::chrono::seconds(60)) != std::future_status::ready) throw std::runtime_error("no end");
    return end.get();
  }

  static bool ran_out_of_memory(const std::exception_ptr& error) {
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& exception) {
      return is_out_of_memory(exception);
    }
  }

  // Eight requests whose prompts of one token are read in one pass; `at_token` is called after their second pass.
  std::vector<Outcome> run_eight(Engine& engine, const std::function<void()>& at_token) {
    std::promise<void> submitted;
    std::vector<std::future<Outcome>> ends;
    std::shared_future<void> all = submitted.get_future().share();
    ends.push_back(submit(engine, {50}, [=] { all.wait(); }));  // holds the engine until all are there
    for (int64_t i = 0; i < 8; ++i) ends.push_back(submit(engine, {i}, at_token));
    submitted.set_value();
    std::vector<Outcome> outcomes;
    for (auto& end : ends) outcomes.push_back(wait(end));
    memory.limit = std::numeric_limits<size_t>::max();
    outcomes.erase(outcomes.begin());
    return outcomes;
  }

  LimitedMemory memory;
  Mixtral model = tiny_model(tiny_config());
};

TEST_F(EngineFaults, APassThatRunsOutOfMemoryIsComputedInHalves) {
  Engine engine(model, std::nullopt, {});
  for (const size_t rows : {4, 2, 1}) {
    const auto outcomes = run_eight(engine, [&] { memory.limit = logits_bytes(rows) + 100; });
    for (size_t i = 0; i < outcomes.size(); ++i) {
      EXPECT_FALSE(outcomes[i].error);
      expect_same(outcomes[i].generation, alone(model, {static_cast<int64_t>(i)}, params(10, 1.0)));
    }
  }
}

// The model computes what was started first: the halves come behind the other passes in flight.
TEST_F(EngineFaults, HalvesKeepTheBitsOfAllPassesInFlight) {
  EngineCore core(std::make_unique<ModelRunner>(model, ModelRunner::Options{4, 8, 8, 100, false}),
                  with_depth({/*chunk_size=*/8, /*token_budget=*/32, /*max_batch=*/8}, 2));
  std::vector<Outcome> outcomes(8);
  for (int64_t i = 0; i < 8; ++i) {
    Request request{{i}, params(10, 1.0)};
    request.experts_per_token = model->config().top_k;
    Callbacks callbacks;
    callbacks.on_end = [&outcome = outcomes[i]](Outcome ended) { outcome = std::move(ended); };
    core.add(std::make_unique<Sequence>(i, std::move(request), std::move(callbacks), std::nullopt));
  }
  for (int64_t step = 0; !core.idle(); ++step) {
    memory.limit = step % 3 ? logits_bytes(step % 3) + 100 : std::numeric_limits<size_t>::max();
    core.step();
  }
  memory.limit = std::numeric_limits<size_t>::max();
  for (int64_t i = 0; i < 8; ++i) {
    EXPECT_FALSE(outcomes[i].error);
    expect_same(outcomes[i].generation, alone(model, {i}, params(10, 1.0)));
  }
}

TEST_F(EngineFaults, ARequestThatDoesNotFitMemoryFailsAlone) {
  const auto long_prompt = random_ids(100, 101, 1);
  const auto expected = alone(model, {1, 2}, params(10, 1.0));
  Engine engine(model, std::nullopt, {});
  std::future<Outcome> large;
  auto small = submit(engine, {1, 2}, [&] {
    large = submit(engine, long_prompt, nullptr);
    memory.limit = logits_bytes(2);
  });
  const auto outcome = wait(small);
  const auto error = wait(large).error;
  memory.limit = std::numeric_limits<size_t>::max();
  expect_same(outcome.generation, expected);
  EXPECT_TRUE(ran_out_of_memory(error));
}

TEST_F(EngineFaults, ExceptionsEndTheRequestsOfTheirPassAndTheEngineGoesOn) {
  Engine engine(model, std::nullopt, {});
  torch::Tensor norm = model->named_parameters()["layers.1.input_layernorm"];
  const torch::Tensor sound = norm.detach();
  for (const bool out_of_memory : {true, false}) {
    const auto outcomes = run_eight(engine, [&] {
      if (out_of_memory) memory.limit = 0;
      if (!out_of_memory) norm.set_data(torch::ones({3}));
    });
    norm.set_data(sound);
    for (const Outcome& outcome : outcomes) {
      ASSERT_TRUE(outcome.error);
      EXPECT_EQ(ran_out_of_memory(outcome.error), out_of_memory);
      EXPECT_LE(outcome.generation.token_ids.size(), 2u);  // fewer where a part of the pass before had failed
      EXPECT_EQ(outcome.generation.finish_reason, "");
    }
    auto next = submit(engine, {3, 4}, nullptr);
    expect_same(wait(next).generation, alone(model, {3, 4}, params(10, 1.0)));
    Timings timings;
    engine.generate({{1}}, {params(1)}, nullptr, &timings);
    EXPECT_EQ(timings.peak_pages, 1);
  }
}

// An expert of the second layer gives NaN: some requests meet it in their prompts, some later, some never.
TEST(EngineSteps, NanInOneRowFailsThatRequestAloneAtAnyStep) {
  const auto sound = tiny_model(tiny_config()), broken = tiny_model(tiny_config());
  const torch::NoGradGuard no_grad;
  broken->named_parameters()["layers.1.moe.down_proj"][2].fill_(std::numeric_limits<float>::quiet_NaN());
  Prompts prompts;
  for (uint64_t i = 0; i < 60; ++i) prompts.push_back(random_ids(1 + i % 3, 101, i));
  const auto expected = Engine(sound, std::nullopt, {}).generate(prompts, {params(6)});
  Engine engine(broken, std::nullopt, {});
  std::vector<size_t> lengths(7);
  for (int round = 0; round < 2; ++round) {  // the second time in the pages of the first
    const auto results = engine.generate(prompts, {params(6)});
    for (size_t i = 0; i < prompts.size(); ++i) {
      const auto& tokens = results[i].token_ids;
      ++lengths[tokens.size()];
      EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), expected[i].token_ids.begin()));
      if (results[i].finish_reason == "error") {
        EXPECT_NE(results[i].error.find("nan"), std::string::npos) << results[i].error;
      } else {
        expect_same(results[i], expected[i]);
      }
    }
  }
  EXPECT_GT(lengths[0], 0u);
  EXPECT_GT(lengths[1] + lengths[2] + lengths[3], 0u);
  EXPECT_GT(lengths[6], 0u);
}

}  // namespace
}  // namespace mixtral
