// Several passes in flight, as for the stages of a pipeline; and ranks that fail.
#include <atomic>
#include <future>
#include <map>
#include <random>

#include "distributed/communicator.h"
#include "engine/engine_thread.h"
#include "engine/model_runner.h"
#include "fake_runner.h"
#include "generations.h"

namespace mixtral {
namespace {

// All requests together, `depth` passes in flight.
std::vector<Generation> generate_in_flight(const Mixtral& model, const std::vector<Request>& requests, int64_t depth,
                                           int64_t speculate = 0) {
  EngineCore core(std::make_unique<ModelRunner>(model, ModelRunner::Options{/*page_size=*/4, /*max_chunk=*/8,
                                                                            /*max_batch=*/6, /*num_pages=*/60, false}),
                  with_depth({/*chunk_size=*/8, /*token_budget=*/24, /*max_batch=*/6, true, /*headroom=*/4}, depth),
                  speculate);
  std::vector<Generation> generations(requests.size());
  for (size_t i = 0; i < requests.size(); ++i) {
    Request request = requests[i];
    if (request.experts_per_token == 0) request.experts_per_token = model->config().top_k;
    const auto trace =
        request.trace ? std::make_shared<Trace>(empty_trace(model->config(), request.experts_per_token)) : nullptr;
    Callbacks callbacks;
    callbacks.on_end = [&generation = generations[i]](Outcome outcome) { generation = std::move(outcome.generation); };
    auto sequence =
        std::make_unique<Sequence>(static_cast<int64_t>(i), std::move(request), std::move(callbacks), std::nullopt);
    sequence->generation.trace = trace;
    core.add(std::move(sequence));
  }
  while (!core.idle()) {
    core.step();
    core.check_integrity();
  }
  return generations;
}

std::vector<Request> some_requests(double temperature) {
  std::vector<Request> requests;
  for (uint64_t i = 0; i < 12; ++i) {
    const auto piece = random_ids(1 + static_cast<int64_t>(i % 7), 101, 1000 + i);
    Request request{piece, params(12, temperature, i)};
    for (uint64_t n = 0; n < i % 4; ++n)
      request.prompt_token_ids.insert(request.prompt_token_ids.end(), piece.begin(), piece.end());
    request.experts_per_token = i % 3 == 0 ? 1 : 2;
    if (i % 5 == 0) request.params.prompt_logprobs = 2;
    request.trace = i % 4 == 0;
    requests.push_back(std::move(request));
  }
  return requests;
}

TEST(PassesInFlight, ChangeNoBit) {
  for (auto& model : {tiny_model(tiny_config()), tiny_model(tiny_config(4, 2, /*window=*/0), torch::kBFloat16)}) {
    for (const double temperature : {0.0, 0.9}) {
      const auto requests = some_requests(temperature);
      std::vector<Generation> alone;
      for (const Request& request : requests) alone.push_back(Engine(model, std::nullopt, {}).generate({request})[0]);
      for (const auto& [depth, speculate] : {std::pair(2, 0), std::pair(4, 0), std::pair(2, 6)}) {
        const auto together = generate_in_flight(model, requests, depth, speculate);
        for (size_t i = 0; i < requests.size(); ++i) {
          expect_same(together[i], alone[i]);
          if (requests[i].trace) {
            EXPECT_EQ(together[i].trace->routing.topk_ids, alone[i].trace->routing.topk_ids);
            EXPECT_EQ(together[i].trace->predicted_id, alone[i].trace->predicted_id);
          }
          ASSERT_EQ(together[i].prompt_logprobs.size(), alone[i].prompt_logprobs.size());
          for (size_t n = 1; n < alone[i].prompt_logprobs.size(); ++n)
            EXPECT_EQ(together[i].prompt_logprobs[n]->logprob, alone[i].prompt_logprobs[n]->logprob);
        }
      }
    }
  }
}

// ---- a rank fails

class RankFailure : public ::testing::Test {
 protected:
  static std::string message_of(const std::exception_ptr& error) {
    try {
      std::rethrow_exception(error);
    } catch (const RankError& rank_error) {
      return rank_error.what();
    }
  }
  void add(EngineCore& core, int64_t id) {
    Request request{{1, 2, 0, 1, 2}, params(20)};
    request.experts_per_token = 2;
    Callbacks callbacks;
    callbacks.on_end = [this, id](Outcome outcome) { ends[id].push_back(message_of(outcome.error)); };
    core.add(std::make_unique<Sequence>(id, std::move(request), std::move(callbacks), std::nullopt));
  }

  std::map<int64_t, std::vector<std::string>> ends;
  const std::vector<std::string> failed{"rank 1 was killed"};
};

TEST_F(RankFailure, EndsEveryRequestOnceAtAnyStepAndTheEngineTakesNoMore) {
  std::mt19937 random(7);
  for (int64_t depth : {1, 2, 4}) {
    for (int64_t call = 1; call <= 24; ++call) {  // of launches and collects
      auto owned = std::make_unique<FakeRunner>(/*window=*/0, /*page_size=*/4, /*num_pages=*/14, /*chunk=*/4);
      int64_t calls = 0;
      owned->before_launch = owned->before_pass = [&] {
        if (++calls == call) throw RankError(1, "was killed");
        if (calls > call) throw std::logic_error("a call after the failure");
      };
      EngineCore core(std::move(owned), with_depth({4, 16, /*max_batch=*/4, true, /*headroom=*/0}, depth),
                      /*speculate=*/2);
      ends.clear();
      for (int64_t id = 0; id < 6; ++id) {
        add(core, id);
        if (random() % 2) core.step();
      }
      while (!core.idle()) core.step();
      core.check_integrity();
      EXPECT_EQ(message_of(core.failure()), failed[0]);
      add(core, 6);
      core.ping();
      for (int64_t id = 0; id <= 6; ++id) EXPECT_EQ(ends[id], failed) << "request " << id << ", call " << call;
      EXPECT_TRUE(core.stats().running == 0 && core.stats().waiting == 0 && core.stats().pages_in_use == 0);
    }
  }
}

TEST_F(RankFailure, OfAPingEndsTheRequestsThatWait) {
  auto owned = std::make_unique<FakeRunner>(0, 4, 10, 4);
  owned->on_ping = [] { throw RankError(1, "was killed"); };
  EngineCore core(std::move(owned), {4, 8, 4});
  add(core, 0);
  core.ping();
  EXPECT_EQ(ends[0], failed);
  EXPECT_TRUE(core.failure());
}

TEST_F(RankFailure, AnIdleThreadPingsFromTheBeginningAndRefusesRequestsAfterAFailure) {
  auto owned = std::make_unique<FakeRunner>(0, 4, 10, 4);
  std::promise<void> pinged, died;
  std::atomic<bool> dies{false};
  int64_t pings = 0;
  owned->on_ping = [&] {
    if (dies) {
      died.set_value();
      throw RankError(1, "was killed");
    }
    if (++pings == 3) pinged.set_value();
  };
  EngineThread engine(std::make_unique<EngineCore>(std::move(owned), Scheduler::Options{4, 8, 4}));
  pinged.get_future().wait();
  EXPECT_FALSE(engine.failure());
  dies = true;
  died.get_future().wait();
  engine.run([](EngineCore& core) { EXPECT_TRUE(core.failure()); });
  std::vector<std::unique_ptr<Sequence>> sequences;
  sequences.push_back(std::make_unique<Sequence>(0, Request{{1}, params(1)}, Callbacks(), std::nullopt));
  try {
    engine.submit(std::move(sequences));
    FAIL() << "an engine without its ranks took a request";
  } catch (const RankError& error) {
    EXPECT_EQ(error.what(), failed[0]);
  }
}

}  // namespace
}  // namespace mixtral
