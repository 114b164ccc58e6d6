// Requests whose every token waits for Engine::allow().
#include <atomic>
#include <future>
#include <limits>

#include "engine/engine_core.h"
#include "engine/model_runner.h"
#include "generations.h"

namespace mixtral {
namespace {

constexpr int64_t kTinyVocab = 101;
using Mask = std::vector<int32_t>;

Mask mask_of(const std::vector<int64_t>& ids) {
  Mask mask((kTinyVocab + 31) / 32);
  for (const int64_t id : ids) mask[static_cast<size_t>(id / 32)] |= static_cast<int32_t>(uint32_t{1} << (id % 32));
  return mask;
}

const Mask kEverything((kTinyVocab + 31) / 32, -1);

// The tokens that may come at step `step`: a third of them, another third each time.
std::vector<int64_t> allowed_at(int64_t step) {
  std::vector<int64_t> ids;
  for (int64_t id = 0; id < kTinyVocab; ++id)
    if ((id + step) % 3 == 0) ids.push_back(id);
  return ids;
}

Outcome end_of(std::future<Outcome> future) {
  if (future.wait_for(std::chrono::seconds(60)) != std::future_status::ready) throw std::runtime_error("no end");
  return future.get();
}

// generate() of one prompt, which must not hang when the constrained requests beside it do.
Generation generate_beside(Engine& engine, const std::vector<int64_t>& prompt, const SamplingParams& sampling) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  const auto give_up = [end] {
    if (std::chrono::steady_clock::now() > end) throw std::runtime_error("no end");
  };
  return engine.generate({prompt}, {sampling}, nullptr, nullptr, give_up)[0];
}

// A constrained request; `mask_at(step)` is handed over for the first token here, for the next ones by the callback.
std::future<Outcome> submit_constrained(Engine& engine, const std::vector<int64_t>& prompt,
                                        const SamplingParams& sampling, std::function<Mask(int64_t step)> mask_at) {
  auto ended = std::make_shared<std::promise<Outcome>>();
  auto id = std::make_shared<std::promise<int64_t>>();
  auto known = std::make_shared<std::shared_future<int64_t>>(id->get_future());
  auto step = std::make_shared<int64_t>(-static_cast<int64_t>(prompt.size() > 512));  // long prompts take two passes
  Callbacks callbacks;
  callbacks.on_progress = [=, &engine](const GenerationProgress&) {
    if (++*step > 0) engine.allow(known->get(), mask_at(*step));
    return true;
  };
  callbacks.on_end = [ended](Outcome outcome) { ended->set_value(std::move(outcome)); };
  Request request = {prompt, sampling};
  request.constrained = true;
  id->set_value(engine.submit(std::move(request), std::move(callbacks)));
  engine.allow(known->get(), mask_at(0));
  return ended->get_future();
}

TEST(Constrained, TakesTheMostLikelyOfTheAllowedTokens) {
  auto model = tiny_model(tiny_config());
  Engine engine(model, std::nullopt, {});
  const auto prompt = random_ids(600, kTinyVocab, 3);
  const auto result = end_of(submit_constrained(engine, prompt, params(7), [](int64_t step) {
                        return mask_of(allowed_at(step));
                      })).generation;
  ASSERT_EQ(result.token_ids.size(), 7u);
  const torch::NoGradGuard no_grad;
  auto ids = prompt;
  for (int64_t step = 0; step < 7; ++step) {
    const auto hidden = whole(model, ids);
    const auto logits = model->logits(hidden.narrow(0, hidden.size(0) - 1, 1))[0];
    const auto allowed = torch::tensor(allowed_at(step), torch::kInt64);
    const int64_t best = allowed[logits.index_select(0, allowed).argmax()].item<int64_t>();
    EXPECT_EQ(result.token_ids[static_cast<size_t>(step)], best) << step;
    EXPECT_EQ(result.logprobs[static_cast<size_t>(step)].token_id, best);
    EXPECT_NEAR(result.logprobs[static_cast<size_t>(step)].logprob,
                torch::log_softmax(logits.to(torch::kFloat64), 0)[best].item<double>(), 1e-5);
    ids.push_back(best);
  }
}

TEST(Constrained, WithEverythingAllowedTheResultIsThatOfAnUnconstrainedRequestWhateverRunsBesideIt) {
  const auto model = tiny_model(tiny_config());
  Engine engine(model, std::nullopt, {});
  std::vector<std::future<Outcome>> ends;
  const auto prompts = some_prompts();
  for (size_t i = 0; i < 3; ++i)
    ends.push_back(submit_constrained(engine, prompts[i], params(9, 1.0, i), [](int64_t) { return kEverything; }));
  std::vector<Generation> beside;
  for (const auto& prompt : prompts) beside.push_back(generate_beside(engine, prompt, params(9, 1.0, 7)));
  for (size_t i = 0; i < 3; ++i) {
    expect_same(end_of(std::move(ends[i])).generation, alone(model, prompts[i], params(9, 1.0, i)));
    expect_same(beside[i], alone(model, prompts[i], params(9, 1.0, 7)));
  }
}

TEST(Constrained, OthersGoOnWhileOneWaits) {
  const auto model = tiny_model(tiny_config());
  Engine engine(model, std::nullopt, {});
  std::promise<Outcome> ended;
  Request waiting = {{1, 2}, params(1)};
  waiting.constrained = true;
  const int64_t id = engine.submit(waiting, {nullptr, [&](Outcome outcome) { ended.set_value(std::move(outcome)); }});
  expect_same(generate_beside(engine, {3, 4}, params(9)), alone(model, {3, 4}, params(9)));
  engine.allow(id, mask_of({50}));
  EXPECT_EQ(end_of(ended.get_future()).generation.token_ids, (std::vector<int64_t>{50}));
}

TEST(Constrained, ALaterMaskReplacesAnEarlierOne) {
  Engine engine(tiny_model(tiny_config()), std::nullopt, {});
  std::promise<Outcome> ended;
  std::promise<int64_t> id;
  int calls = 0;
  Request first = {{1, 2}, params(3)};
  engine.submit(first, {[&, known = id.get_future().share()](const GenerationProgress&) {
                          if (++calls == 1) {  // both reach the engine before its next pass
                            engine.allow(known.get(), mask_of({50}));
                            engine.allow(known.get(), mask_of({51}));
                          }
                          return true;
                        },
                        nullptr});
  Request second = {{1, 2}, params(1)};
  second.constrained = true;
  id.set_value(engine.submit(second, {nullptr, [&](Outcome outcome) { ended.set_value(std::move(outcome)); }}));
  EXPECT_EQ(end_of(ended.get_future()).generation.token_ids, (std::vector<int64_t>{51}));
}

TEST(Constrained, AWaitingRequestCanBeCancelledAndAnEndedOneIsIgnored) {
  const auto model = tiny_model(tiny_config());
  Engine engine(model, std::nullopt, {});
  std::promise<Outcome> ended;
  Request waiting = {{1, 2}, params(9)};
  waiting.constrained = true;
  const int64_t id = engine.submit(waiting, {nullptr, [&](Outcome outcome) { ended.set_value(std::move(outcome)); }});
  generate_beside(engine, {3, 4}, params(3));
  engine.cancel(id);
  EXPECT_EQ(end_of(ended.get_future()).generation.finish_reason, "cancelled");
  engine.allow(id, kEverything);
  engine.allow(12345, kEverything);
  expect_same(generate_beside(engine, {3, 4}, params(9)), alone(model, {3, 4}, params(9)));
}

TEST(Constrained, NoAllowedTokenIsAnErrorOfThatRequest) {
  const auto model = tiny_model(tiny_config());
  Engine engine(model, std::nullopt, {});
  auto end =
      submit_constrained(engine, {1, 2}, params(9), [](int64_t step) { return step < 2 ? kEverything : mask_of({}); });
  const auto result = end_of(std::move(end)).generation;
  EXPECT_EQ(result.finish_reason, "error");
  EXPECT_EQ(result.error, "sampling: no token is allowed and has a finite logit");
  EXPECT_EQ(result.token_ids.size(), 2u);
  expect_same(generate_beside(engine, {3, 4}, params(9)), alone(model, {3, 4}, params(9)));
}

TEST(Constrained, BitsBehindTheVocabularyAreNotLookedAt) {
  Engine engine(tiny_model(tiny_config()), std::nullopt, {});
  Mask mask = mask_of({100});
  mask.back() |= static_cast<int32_t>(~uint32_t{0} << (kTinyVocab % 32));
  const auto result = end_of(submit_constrained(engine, {1, 2}, params(3), [&](int64_t) { return mask; })).generation;
  EXPECT_EQ(result.token_ids, (std::vector<int64_t>{100, 100, 100}));
}

TEST(Constrained, WrongCallsAreRefusedInTheCallersThread) {
  Engine engine(tiny_model(tiny_config()), std::nullopt, {});
  EXPECT_THROW(engine.allow(0, Mask(3)), std::invalid_argument);
  EXPECT_THROW(engine.allow(0, Mask(5)), std::invalid_argument);
  Request request = {{1, 2}, params(3)};
  request.constrained = true;
  EXPECT_THROW(engine.generate({request}), std::invalid_argument);
}

// So the next mask can be made while the pass runs, and the request takes part in each pass.
TEST(Constrained, ATokenIsToldOfBeforeThePassThatReadsIt) {
  const ModelRunner::Options options = {/*page_size=*/4, /*max_chunk=*/16, /*max_batch=*/2, /*num_pages=*/20, false};
  EngineCore core(std::make_unique<ModelRunner>(tiny_model(tiny_config()), options),
                  {/*chunk_size=*/16, /*token_budget=*/32, /*max_batch=*/2});
  Request request = {random_ids(9, kTinyVocab, 1), params(4)};
  request.constrained = true;
  int64_t picked = 0, told = 0;
  const auto count = [&](const GenerationProgress& progress) {
    picked = static_cast<int64_t>(progress.generation.token_ids.size());
    return true;
  };
  core.add(std::make_unique<Sequence>(0, request, Callbacks{count, nullptr}, std::nullopt));
  core.after_pass = [&] {
    if (picked == told) return;
    told = picked;
    EXPECT_EQ(core.stats().computed_tokens, 9 + picked - 1);
    core.allow(0, kEverything);
  };
  core.allow(0, kEverything);
  int passes = 0;
  for (; told < 3 && passes < 20; ++passes) core.step();
  EXPECT_EQ(passes, 4);  // the prompt, and one for each token
}

TEST(Constrained, MasksThatComeTogetherAreTakenTogether) {
  const auto model = tiny_model(tiny_config());
  Engine engine(model, std::nullopt, {});
  std::promise<Outcome> ended[2];
  int64_t ids[2];
  for (int i = 0; i < 2; ++i) {
    Request waiting = {{1, 2, i}, params(1)};
    waiting.constrained = true;
    ids[i] = engine.submit(waiting, {nullptr, [&, i](Outcome outcome) { ended[i].set_value(std::move(outcome)); }});
  }
  engine.allow({{ids[0], mask_of({50})}, {ids[1], mask_of({51})}});
  EXPECT_EQ(end_of(ended[0].get_future()).generation.token_ids, (std::vector<int64_t>{50}));
  EXPECT_EQ(end_of(ended[1].get_future()).generation.token_ids, (std::vector<int64_t>{51}));
  EXPECT_THROW(engine.allow({{ids[0], kEverything}, {ids[1], Mask(3)}}), std::invalid_argument);
}

// The engine's thread sleeps then, instead of running empty passes.
TEST(Constrained, TheEngineIsIdleWhileAllThatRunsWaits) {
  const ModelRunner::Options options = {/*page_size=*/4, /*max_chunk=*/4, /*max_batch=*/1, /*num_pages=*/10, false};
  EngineCore core(std::make_unique<ModelRunner>(tiny_model(tiny_config()), options),
                  {/*chunk_size=*/4, /*token_budget=*/8, /*max_batch=*/1});
  Request request = {random_ids(9, kTinyVocab, 1), params(2)};
  request.constrained = true;
  std::vector<int64_t> tokens;
  const Callbacks callbacks = {nullptr, [&](Outcome outcome) { tokens = outcome.generation.token_ids; }};
  core.add(std::make_unique<Sequence>(0, request, callbacks, std::nullopt));
  core.add(std::make_unique<Sequence>(1, Request{{1}, params(1)}, Callbacks(), std::nullopt));  // waits for its seat
  const auto passes_until_idle = [&] {
    int passes = 0;
    for (; !core.idle() && passes < 20; ++passes) core.step();
    return passes;
  };
  EXPECT_EQ(passes_until_idle(), 4);  // 4 + 4 + 1 tokens, and nothing to do
  core.allow(0, mask_of({50}));
  EXPECT_EQ(passes_until_idle(), 2);  // picks a token and computes it, and nothing to do
  core.allow(0, mask_of({51}));
  passes_until_idle();
  EXPECT_EQ(tokens, (std::vector<int64_t>{50, 51}));
}

}  // namespace
}  // namespace mixtral
