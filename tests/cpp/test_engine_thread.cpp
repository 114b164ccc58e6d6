// The engine's thread on a model that is nothing but its cache, and many threads that use it at once.
#include <future>
#include <random>
#include <thread>

#include "engine/engine_thread.h"
#include "fake_runner.h"

namespace mixtral {
namespace {

TEST(EngineThread, ManyThreadsMayUseItAtOnceFromItsFirstRequestOn) {
  constexpr int64_t kClients = 4, kRequests = 40, kWindow = 6;
  EngineThread engine(std::make_unique<EngineCore>(
      std::make_unique<FakeRunner>(kWindow, /*page_size=*/4, /*num_pages=*/24, /*chunk=*/8),
      Scheduler::Options{/*chunk_size=*/8, /*token_budget=*/16, /*max_batch=*/4}));
  std::promise<void> start;
  const auto started = start.get_future().share();
  const auto work = [&](int64_t client) {
    std::mt19937 random(static_cast<unsigned>(client));
    std::vector<std::future<Outcome>> outcomes;
    started.wait();
    for (int64_t i = 0; i < kRequests; ++i) {
      const int64_t id = client * kRequests + i;
      Request request;
      for (int64_t length = 1 + random() % 20; length > 0; --length)
        request.prompt_token_ids.push_back(random() % kFakeVocab);
      request.params.max_tokens = 1 + random() % 10;
      request.experts_per_token = 2;
      const auto ended = std::make_shared<std::promise<Outcome>>();
      outcomes.push_back(ended->get_future());
      Callbacks callbacks;
      callbacks.on_end = [ended](Outcome outcome) { ended->set_value(std::move(outcome)); };
      std::vector<std::unique_ptr<Sequence>> sequences;
      sequences.push_back(std::make_unique<Sequence>(id, std::move(request), std::move(callbacks), std::nullopt));
      engine.submit(std::move(sequences));
      if (i % 5 == 4) engine.cancel({id - 1});
      if (i % 7 == 6) engine.allow({{id, {}}});  // not constrained: ignored
      if (i % 9 == 8) engine.run([](EngineCore& core) { EXPECT_LE(core.stats().running, 4); });
      EXPECT_LE(engine.stats().running, 4);
      EXPECT_FALSE(engine.is_current());
    }
    for (auto& outcome : outcomes) {
      ASSERT_EQ(outcome.wait_for(std::chrono::seconds(60)), std::future_status::ready);
      const Generation generation = outcome.get().generation;
      if (generation.finish_reason == "cancelled") continue;
      ASSERT_EQ(generation.finish_reason, "length");
      const auto count = static_cast<int64_t>(generation.token_ids.size());
      const auto expected = fake_samples(generation.prompt_token_ids, count, kWindow, /*experts=*/2);
      for (size_t i = 0; i < expected.size(); ++i) EXPECT_EQ(generation.token_ids[i], expected[i].token_id);
    }
  };
  std::vector<std::thread> clients;
  for (int64_t client = 0; client < kClients; ++client) clients.emplace_back(work, client);
  start.set_value();
  for (std::thread& client : clients) client.join();
  engine.run([](EngineCore& core) {
    core.check_integrity();
    EXPECT_EQ(core.stats().pages_in_use, 0);
  });
}

// Who watches the engine from outside must see that it hangs, and must not hang with it.
TEST(EngineThread, NobodyWaitsForAPassThatHangs) {
  auto runner = std::make_unique<FakeRunner>(/*window=*/0, /*page_size=*/4, /*num_pages=*/24, /*chunk=*/8);
  std::promise<void> hangs, go_on;
  runner->before_pass = [&, first = true]() mutable {
    if (!std::exchange(first, false)) return;
    hangs.set_value();
    go_on.get_future().wait();
  };
  EngineThread engine(std::make_unique<EngineCore>(
      std::move(runner), Scheduler::Options{/*chunk_size=*/8, /*token_budget=*/16, /*max_batch=*/4}));
  std::promise<Outcome> ended[2];
  const auto submit = [&](int64_t id) {
    Request request = {{1, 2}, {}};
    request.params.max_tokens = 3;
    request.experts_per_token = 2;
    Callbacks callbacks;
    callbacks.on_end = [&, id](Outcome outcome) { ended[id].set_value(std::move(outcome)); };
    std::vector<std::unique_ptr<Sequence>> sequences;
    sequences.push_back(std::make_unique<Sequence>(id, std::move(request), std::move(callbacks), std::nullopt));
    engine.submit(std::move(sequences));
  };
  submit(0);
  hangs.get_future().wait();
  submit(1);
  EXPECT_EQ(engine.stats().waiting, 1);
  EXPECT_EQ(engine.stats().computed_tokens, 0);
  engine.allow({{1, {}}});
  engine.cancel({1});
  EXPECT_EQ(engine.stats().waiting, 1);  // it ends with the pass
  go_on.set_value();
  EXPECT_EQ(ended[0].get_future().get().generation.finish_reason, "length");
  EXPECT_EQ(ended[1].get_future().get().generation.finish_reason, "cancelled");
}

}  // namespace
}  // namespace mixtral
