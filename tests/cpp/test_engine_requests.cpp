// Requests that come and go while others run: submit, cancel, threads, errors, memory.
#include <ATen/Parallel.h>

#include <atomic>
#include <fstream>
#include <future>
#include <map>
#include <random>
#include <thread>

#include "generations.h"
#include "io/size.h"
#include "model/memory.h"

namespace mixtral {
namespace {

// The end of a submitted request.
struct Waiter {
  Callbacks callbacks(std::function<bool(const GenerationProgress&)> on_progress = nullptr) {
    return {std::move(on_progress), [ended = ended](Outcome outcome) { ended->set_value(std::move(outcome)); }};
  }
  Outcome wait() {
    auto future = ended->get_future();
    if (future.wait_for(std::chrono::seconds(60)) != std::future_status::ready) throw std::runtime_error("no end");
    return future.get();
  }
  std::shared_ptr<std::promise<Outcome>> ended = std::make_shared<std::promise<Outcome>>();
};

Engine make_engine(const Mixtral& model, int64_t kv_pages = 0) {
  Engine::Options options;
  options.page_size = 4;
  options.kv_memory = kv_pages * RollingKVCache::page_bytes(model->config(), 4, model->dtype());
  return Engine(model, std::nullopt, options);
}

Request request(std::vector<int64_t> prompt, const SamplingParams& sampling) { return {std::move(prompt), sampling}; }

const auto kEndless = params(8000);  // a request that runs until it is cancelled

TEST(EngineRequests, ASubmittedRequestGetsTheResultOfGenerate) {
  const auto model = tiny_model(tiny_config());
  Engine engine = make_engine(model);
  std::map<int, Waiter> waiters;
  const auto prompts = some_prompts();
  for (int i = 0; i < 3; ++i) engine.submit(request(prompts[i], params(9, 1.0, i)), waiters[i].callbacks());
  for (int i = 0; i < 3; ++i) {
    const Outcome outcome = waiters[i].wait();
    EXPECT_FALSE(outcome.error);
    expect_same(outcome.generation, alone(model, prompts[i], params(9, 1.0, i)));
    EXPECT_EQ(outcome.generation.prompt_token_ids, prompts[i]);
    EXPECT_EQ(outcome.timings.prompt_tokens, static_cast<int64_t>(prompts[i].size()));
    EXPECT_EQ(outcome.timings.new_tokens, 9);
    EXPECT_GT(outcome.timings.prefill_seconds, 0);
    EXPECT_GT(outcome.timings.decode_seconds, 0);
    EXPECT_GT(outcome.timings.peak_pages, 0);
  }
}

TEST(EngineRequests, TwoThreadsThatGenerateGetWhatEachGetsAlone) {
  const auto model = tiny_model(tiny_config(), torch::kBFloat16);
  Engine engine = make_engine(model);
  const auto work = [&](uint64_t seed) {
    for (uint64_t round = 0; round < 6; ++round) {
      const Prompts prompts = {random_ids(5 + 17 * round % 40, 101, seed + round), random_ids(3, 101, seed)};
      const auto results = engine.generate(prompts, {params(12, 1.0, seed)});
      for (size_t i = 0; i < 2; ++i) expect_same(results[i], alone(model, prompts[i], params(12, 1.0, seed)));
    }
  };
  std::thread other(work, 100);
  work(200);
  other.join();
}

TEST(EngineRequests, CancelEndsOneRequestAlone) {
  const auto model = tiny_model(tiny_config());
  Engine engine = make_engine(model);
  Waiter endless, other;
  std::promise<void> running;
  std::atomic<bool> told{false};
  const int64_t id = engine.submit(request({1, 2}, kEndless), endless.callbacks([&](const GenerationProgress&) {
    if (!told.exchange(true)) running.set_value();
    return true;
  }));
  engine.submit(request({3, 4}, params(20)), other.callbacks());
  running.get_future().wait();
  engine.cancel(id);
  const Outcome outcome = endless.wait();
  EXPECT_EQ(outcome.generation.finish_reason, "cancelled");
  EXPECT_LT(outcome.generation.token_ids.size(), 8000u);
  expect_same(other.wait().generation, alone(model, {3, 4}, params(20)));
  engine.cancel(id);  // has ended: ignored
  engine.cancel(12345);
  expect_same(engine.generate({{3, 4}}, {params(20)})[0], alone(model, {3, 4}, params(20)));
}

TEST(EngineRequests, ABadRequestIsRefusedInTheCallersThread) {
  const auto model = tiny_model(tiny_config());
  Engine engine = make_engine(model);
  Waiter good, bad;
  engine.submit(request({3, 4}, params(200)), good.callbacks());
  EXPECT_THROW(engine.submit(request({}, params(5)), bad.callbacks()), std::invalid_argument);
  EXPECT_THROW(engine.submit(request({101}, params(5)), bad.callbacks()), std::invalid_argument);
  EXPECT_THROW(engine.submit(request({1}, params(0)), bad.callbacks()), std::invalid_argument);
  EXPECT_THROW(engine.generate({{1}, {101}}, {params(5)}), std::invalid_argument);
  expect_same(good.wait().generation, alone(model, {3, 4}, params(200)));
}

struct Mine : std::runtime_error {
  using std::runtime_error::runtime_error;
};

TEST(EngineRequests, AnExceptionOfACallbackEndsItsRequest) {
  const auto model = tiny_model(tiny_config());
  Engine engine = make_engine(model);
  Waiter failing, other;
  int calls = 0;
  engine.submit(request({1, 2}, params(9)), failing.callbacks([&](const GenerationProgress&) -> bool {
    if (++calls == 3) throw Mine("mine");
    return true;
  }));
  engine.submit(request({3, 4}, params(9)), other.callbacks());
  const Outcome outcome = failing.wait();
  EXPECT_THROW(std::rethrow_exception(outcome.error), Mine);
  EXPECT_EQ(outcome.generation.token_ids.size(), 3u);
  expect_same(other.wait().generation, alone(model, {3, 4}, params(9)));

  const auto fail = [](size_t index, const std::string&) -> bool {
    if (index == 1) throw Mine("mine");
    return true;
  };
  EXPECT_THROW(engine.generate({{1}, {2}}, {kEndless}, fail), Mine);  // the other one does not run on
  expect_same(engine.generate({{3, 4}}, {params(9)})[0], alone(model, {3, 4}, params(9)));
}

TEST(EngineRequests, AnExceptionOfTheForwardPassReachesTheCallerAndTheEngineGoesOn) {
  auto model = tiny_model(tiny_config());
  Engine engine = make_engine(model);
  const torch::NoGradGuard no_grad;
  auto norm = model->named_parameters()["norm"];
  const auto saved = norm.clone();
  norm.set_data(torch::ones({7}));
  EXPECT_ANY_THROW(engine.generate({{1, 2}}, {params(3)}));
  norm.set_data(saved);
  expect_same(engine.generate({{3, 4}}, {params(9)})[0], alone(model, {3, 4}, params(9)));
}

TEST(EngineRequests, WhoWaitsMayGiveUp) {
  const auto model = tiny_model(tiny_config());
  Engine engine = make_engine(model);
  int looks = 0;
  const auto give_up = [&] {
    if (++looks == 2) throw Mine("enough");
  };
  const auto caller = std::this_thread::get_id();
  EXPECT_THROW(engine.generate({{1}, {2}}, {kEndless}, nullptr, nullptr,
                               [&] {
                                 EXPECT_EQ(std::this_thread::get_id(), caller);
                                 give_up();
                               }),
               Mine);
  EXPECT_EQ(looks, 2);
  expect_same(engine.generate({{3, 4}}, {params(9)})[0], alone(model, {3, 4}, params(9)));
}

TEST(EngineRequests, TheCallersThreadCountHoldsInTheEngine) {
  Engine engine = make_engine(tiny_model(tiny_config()));
  const int before = at::get_num_threads();
  for (const int count : {1, 3, 2}) {
    at::set_num_threads(count);
    int seen = 0;
    engine.generate({{1, 2}}, {params(2)}, [&](size_t, const std::string&) {
      seen = at::get_num_threads();
      return true;
    });
    EXPECT_EQ(seen, count);
  }
  at::set_num_threads(before);
}

int threads_of_process() {
  std::ifstream status("/proc/self/status");
  int count = 0;
  for (std::string word; status >> word;)
    if (word == "Threads:" && status >> count) return count;
  return 0;
}

TEST(EngineRequests, IdleWorkersDoNotOutlastTheirWork) {
  const int before = at::get_num_threads();
  at::set_num_threads(4);
  const auto sum = [] { return torch::ones({1 << 20}).sum().item<float>(); };
  sum();
  const int with_workers = threads_of_process();
  Engine engine = make_engine(tiny_model(tiny_config()));
  int in_engine = 0;
  engine.generate({{1, 2}}, {params(2)}, [&](size_t, const std::string&) {
    sum();
    in_engine = threads_of_process();
    return true;
  });
  EXPECT_LE(in_engine, with_workers + 1);  // the engine's thread and its workers, without the caller's
  EXPECT_EQ(at::get_num_threads(), 4);
  EXPECT_EQ(sum(), 1 << 20);
  at::set_num_threads(before);
}

TEST(EngineRequests, ADestroyedEngineCancelsWhatIsLeft) {
  Waiter running, waiting;
  {
    Engine::Options options;
    options.max_batch = 1;
    Engine engine(tiny_model(tiny_config()), std::nullopt, options);
    engine.submit(request({1, 2}, kEndless), running.callbacks());
    engine.submit(request({1, 2}, kEndless), waiting.callbacks());
  }
  EXPECT_EQ(running.wait().generation.finish_reason, "cancelled");
  EXPECT_EQ(waiting.wait().generation.finish_reason, "cancelled");
}

TEST(EngineRequests, AStoppedEngineTakesNoRequest) {
  Engine engine = make_engine(tiny_model(tiny_config()));
  engine.generate({{1}}, {params(2)});
  engine.stop();
  engine.stop();
  EXPECT_THROW(engine.generate({{1}}, {params(2)}), std::runtime_error);
}

TEST(EngineRequests, CallbacksMaySubmitAndCancelButNotWait) {
  const auto model = tiny_model(tiny_config());
  Engine engine = make_engine(model);
  Waiter first, second;
  std::atomic<bool> refused{false};
  int calls = 0;
  engine.submit(request({1, 2}, params(4)), first.callbacks([&](const GenerationProgress&) {
    if (++calls > 1) return true;
    try {
      engine.generate({{1}}, {params(2)});
    } catch (const std::logic_error&) {
      refused = true;
    }
    engine.submit(request({3, 4}, params(4)), second.callbacks());
    return true;
  }));
  expect_same(first.wait().generation, alone(model, {1, 2}, params(4)));
  expect_same(second.wait().generation, alone(model, {3, 4}, params(4)));
  EXPECT_TRUE(refused);
}

TEST(EngineRequests, ACallbackMayDropTheEngine) {
  auto engine = std::make_unique<Engine>(make_engine(tiny_model(tiny_config())));
  std::promise<std::string> reason;
  std::promise<void> stored;
  engine->submit(request({1, 2}, kEndless), {[&](const GenerationProgress&) {
                                               stored.get_future().wait();
                                               engine.reset();
                                               return true;
                                             },
                                             [&](Outcome end) { reason.set_value(end.generation.finish_reason); }});
  stored.set_value();
  EXPECT_EQ(reason.get_future().get(), "cancelled");
}

// ---- memory
// ----------------------------------------------------------------------------------------------------------

TEST(EngineRequests, WhatDoesNotFitThePoolWaits) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine engine = make_engine(model, /*kv_pages=*/12);
  const Prompts prompts = {random_ids(13, 101, 1), random_ids(20, 101, 2), random_ids(1, 101, 3),
                           random_ids(30, 101, 4)};
  Timings timings;
  const auto results = engine.generate(prompts, {params(12)}, nullptr, &timings);
  for (size_t i = 0; i < prompts.size(); ++i) expect_same(results[i], alone(model, prompts[i], params(12)));
  EXPECT_LE(timings.peak_pages, 12);
}

TEST(EngineRequests, WhatCanNeverFitIsRefusedInTheCallersThread) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine engine = make_engine(model, /*kv_pages=*/5);
  Waiter small, large;
  engine.submit(request({1, 2}, params(18)), small.callbacks());  // five pages, all there are
  try {
    engine.submit(request({1, 2}, params(19)), large.callbacks());
    FAIL();
  } catch (const OutOfMemory& error) {
    const auto page = static_cast<double>(RollingKVCache::page_bytes(model->config(), 4, model->dtype()));
    EXPECT_EQ(std::string(error.what()), "the key/value cache: prompt and max_tokens of 21 tokens need 6 pages (" +
                                             bytes_text(6 * page) + "), and the pool has 5 (" + bytes_text(5 * page) +
                                             "): lower max_tokens or raise kv_memory");
  }
  expect_same(small.wait().generation, alone(model, {1, 2}, params(18)));
  EXPECT_THROW(engine.generate({{1}}, {params(100)}), OutOfMemory);
}

TEST(EngineRequests, APoolThatMemoryCannotHoldIsRefusedWithNumbers) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/0));
  Engine::Options options;
  options.kv_memory = int64_t{1536} << 30;
  try {
    Engine(model, std::nullopt, options);
    FAIL();
  } catch (const OutOfMemory& error) {
    EXPECT_EQ(std::string(error.what()).find("the key/value cache: needs 1.50 TiB on cpu, "), 0u) << error.what();
  }
  options.kv_memory = 10;
  EXPECT_THROW(Engine(model, std::nullopt, options), std::invalid_argument);  // not even a page
  // Without kv_memory the pool has what the device can afford, and a context beyond that is refused.
  options.kv_memory = 0;
  options.ctx_size = int64_t{1} << 40;
  Engine engine(model, std::nullopt, options);
  EXPECT_THROW(engine.generate({{1}}, {params(int64_t{1} << 32)}), OutOfMemory);
  EXPECT_EQ(engine.generate({{1}}, {params(3)})[0].finish_reason, "length");
}

TEST(EngineRequests, ABurstGetsExactlyTheSeatsThatThereAre) {
  const auto model = tiny_model(tiny_config());
  Engine::Options options;
  options.max_queue = 16;
  Engine engine(model, std::nullopt, options);
  std::promise<void> blocked, go_on;  // the engine runs nothing until all have asked
  engine.submit(request({1}, params(1)), {[&](const GenerationProgress&) {
                                            blocked.set_value();
                                            go_on.get_future().wait();
                                            return true;
                                          },
                                          nullptr});
  blocked.get_future().wait();
  std::atomic<int> taken{0}, refused{0}, ended{0};
  std::vector<std::thread> clients;
  for (int i = 0; i < 4; ++i) {
    clients.emplace_back([&] {
      for (int j = 0; j < 100; ++j) {
        try {
          engine.submit(request({1, 2}, params(2)), {nullptr, [&](Outcome) { ++ended; }});
          ++taken;
        } catch (const QueueFull&) {
          ++refused;
        }
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(taken, 15);
  EXPECT_EQ(refused, 400 - 15);
  go_on.set_value();
  for (int i = 0; i < 6000 && ended < 15; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  ASSERT_EQ(ended, 15);
  const Seat seat = engine.reserve_seats(1)[0];  // ended requests hold none
  EXPECT_EQ(engine.generate(std::vector<std::vector<int64_t>>(15, {3, 4}), {params(3)}).size(), 15u);
  EXPECT_THROW(engine.generate(std::vector<std::vector<int64_t>>(16, {3, 4}), {params(3)}), QueueFull);
  Request reserved = request({3, 4}, params(3));
  reserved.seat = seat;
  EXPECT_EQ(engine.generate({reserved})[0].token_ids.size(), 3u);
}

TEST(EngineRequests, PromptsBeyondTheTokensOfTheQueueAreRefused) {
  Engine::Options options;
  options.max_queue_tokens = 10;
  Engine engine(tiny_model(tiny_config()), std::nullopt, options);
  Waiter running;
  const int64_t id = engine.submit(request({1, 2, 3, 4, 5, 6}, kEndless), running.callbacks());
  EXPECT_THROW(engine.submit(request({1, 2, 3, 4, 5}, params(1)), {}), QueueFull);
  EXPECT_EQ(engine.stats().seats_taken, 1);
  EXPECT_THROW(engine.submit(request(std::vector<int64_t>(11, 1), params(1)), {}), std::invalid_argument);
  Waiter fits;
  engine.submit(request({1, 2, 3, 4}, params(1)), fits.callbacks());
  EXPECT_EQ(fits.wait().generation.finish_reason, "length");
  engine.cancel(id);
  running.wait();
  EXPECT_EQ(engine.generate({std::vector<int64_t>(10, 1)}, {params(1)})[0].token_ids.size(), 1u);
  EXPECT_EQ(engine.stats().seats_taken, 0);
}

TEST(EngineRequests, SeatsAreReservedTogetherOrNotAtAll) {
  Engine::Options options;
  options.max_queue = 3;
  Engine engine(tiny_model(tiny_config()), std::nullopt, options);
  auto seats = engine.reserve_seats(2);
  EXPECT_THROW(engine.reserve_seats(2), QueueFull);
  EXPECT_THROW(engine.reserve_seats(4), std::invalid_argument);
  EXPECT_THROW(engine.reserve_seats(0), std::invalid_argument);
  EXPECT_EQ(engine.stats().seats_taken, 2);
  seats.pop_back();
  EXPECT_EQ(engine.reserve_seats(2).size(), 2u);
  EXPECT_EQ(engine.stats().seats_taken, 1);
}

// Requests of random sizes at random times: some wait, some are preempted, some are cancelled.
TEST(EngineRequests, RandomArrivalsGetTheirResultsAndLeaveNoPageBehind) {
  const auto model = tiny_model(tiny_config(4, 2, /*window=*/8));
  for (const int64_t kv_pages : {0, 12}) {  // the largest request needs ceil((7 + 25) / 4) + 1 pages
    Engine engine = make_engine(model, kv_pages);
    std::mt19937 random(5);
    std::map<size_t, Waiter> waiters;
    std::map<size_t, std::pair<std::vector<int64_t>, SamplingParams>> requests;
    std::map<size_t, int64_t> ids;
    for (size_t i = 0; i < 40; ++i) {
      requests[i] = {random_ids(1 + random() % 25, 101, i), params(1 + random() % 20, 1.0, i)};
      ids[i] = engine.submit(request(requests[i].first, requests[i].second), waiters[i].callbacks());
      if (i % 7 == 3) engine.cancel(ids[i - 1]);
      if (i % 5 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(random() % 5));
    }
    for (size_t i = 0; i < 40; ++i) {
      const Outcome outcome = waiters[i].wait();
      ASSERT_FALSE(outcome.error);
      if (outcome.generation.finish_reason == "cancelled") continue;
      expect_same(outcome.generation, alone(model, requests[i].first, requests[i].second));
    }
    Timings timings;
    engine.generate({{1}}, {params(1)}, nullptr, &timings);
    EXPECT_EQ(timings.peak_pages, 1);
  }
}

}  // namespace
}  // namespace mixtral
