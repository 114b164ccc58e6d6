// A run that is written down, and runs that have to be like it.
#include <filesystem>
#include <fstream>
#include <string>

#include "engine/plan_trace.h"
#include "fake_runner.h"
#include "generations.h"
#include "io/load_error.h"

namespace mixtral {
namespace {

class PlanTraceTest : public ::testing::Test {
 protected:
  PlanTraceTest() {
    for (uint64_t i = 0; i < 8; ++i) {
      const auto piece = random_ids(1 + static_cast<int64_t>(i % 5), 101, i);
      requests.push_back({piece, params(15, i % 2 ? 0.9 : 0.0, i)});
      for (uint64_t n = 0; n < 3; ++n)
        requests[i].prompt_token_ids.insert(requests[i].prompt_token_ids.end(), piece.begin(), piece.end());
    }
  }
  ~PlanTraceTest() override { std::filesystem::remove(file); }

  Engine::Options options(const std::string& trace, const std::string& replay) const {
    Engine::Options options;
    options.page_size = 4;
    options.chunk_size = 8;
    options.speculate = 4;
    options.plan_trace = trace;
    options.plan_replay = replay;
    return options;
  }
  void write() {
    Engine engine(model, std::nullopt, options(file, ""));
    engine.generate(requests);
    engine.generate({requests[0]});
    engine.finish_plan_trace();
  }
  // The message of what went wrong; empty: nothing.
  std::string replay() {
    Engine engine(model, std::nullopt, options("", file));
    try {
      engine.generate(requests);
      engine.generate({requests[0]});
      engine.finish_plan_trace();
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  }
  std::vector<std::string> lines() const {
    std::ifstream in(file);
    std::vector<std::string> lines;
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    return lines;
  }
  void write_lines(const std::vector<std::string>& lines) const {
    std::ofstream out(file);
    for (const std::string& line : lines) out << line << '\n';
  }

  const std::string file = (std::filesystem::path(::testing::TempDir()) / "plan.jsonl").string();
  Mixtral model = tiny_model(tiny_config());
  std::vector<Request> requests;
};

TEST_F(PlanTraceTest, TheSameRunIsReproduced) {
  write();
  EXPECT_GT(lines().size(), 20u);
  EXPECT_EQ(lines()[0].rfind(R"({"pass":1,"preemptions":0,"requests":[{"draft":[],"id":0,"picked":[)", 0), 0u)
      << lines()[0];
  EXPECT_EQ(replay(), "");
}

TEST_F(PlanTraceTest, TheFirstDifferenceIsNamed) {
  write();
  const auto recorded = lines();
  const auto changed = [&](size_t pass, const std::string& from, const std::string& to) {
    auto copy = recorded;
    const size_t place = copy[pass - 1].find(from);
    EXPECT_NE(place, std::string::npos) << copy[pass - 1];
    copy[pass - 1].replace(place, from.size(), to);
    write_lines(copy);
    return replay();
  };
  EXPECT_EQ(changed(1, R"("tokens":4)", R"("tokens":5)"),
            "plan replay: pass 1 has for request 0 as tokens 4 and not 5");
  EXPECT_EQ(changed(3, R"("draft":[])", R"("draft":[7])").rfind("plan replay: pass 3 has for request ", 0), 0u);
  EXPECT_EQ(changed(2, R"("preemptions":0)", R"("preemptions":3)"),
            "plan replay: pass 2 comes after preemptions 0 and not 3");
  EXPECT_EQ(changed(5, R"("id":0)", R"("id":11)").rfind("plan replay: pass 5 computes requests [0", 0), 0u);
  const auto picked = changed(4, R"("picked":[)", R"("picked":[100,)");
  EXPECT_EQ(picked.rfind("plan replay: pass 4 has for request 0 as picked [", 0), 0u) << picked;
  EXPECT_NE(picked.find(" and not [100"), std::string::npos) << picked;
}

TEST_F(PlanTraceTest, OtherRequestsMoreOrFewerPassesAreDifferences) {
  write();
  const auto recorded = lines();
  write_lines({recorded.begin(), recorded.end() - 1});
  EXPECT_EQ(replay(), "plan replay: pass " + std::to_string(recorded.size()) + " is one more than " + file + " has");
  auto longer = recorded;
  longer.push_back(recorded.back());
  write_lines(longer);
  EXPECT_EQ(replay(),
            "plan replay: there were " + std::to_string(recorded.size()) + " passes, and " + file + " has more");
  write_lines(recorded);
  requests[3].params.seed = 1234;
  EXPECT_EQ(replay().rfind("plan replay: pass ", 0), 0u);
}

TEST_F(PlanTraceTest, BadFilesAreErrors) {
  EXPECT_THROW(Engine(model, std::nullopt, options("", file)), LoadError);  // there is none
  EXPECT_THROW(Engine(model, std::nullopt, options("/nowhere/plan.jsonl", "")), std::runtime_error);
  EXPECT_THROW(Engine(model, std::nullopt, options(file, file)), std::invalid_argument);
  for (const std::string line : {"no JSON", "{}", R"({"requests":[],"preemptions":0})", R"({"requests":[1]})"}) {
    write_lines({line});
    Engine engine(model, std::nullopt, options("", file));
    if (line[0] == '{') {
      EXPECT_NE(replay(), "");
    } else {
      EXPECT_THROW(engine.generate(requests), LoadError);
    }
  }
}

// Guesses depend on how long passes take. A replay that is faster or slower makes those of the file, and preempts as it
// does.
TEST_F(PlanTraceTest, AReplayMakesTheGuessesOfTheFile) {
  const auto run = [this](double seconds_of_a_token, std::unique_ptr<PlanTrace> trace) {
    auto runner = std::make_unique<FakeRunner>(/*window=*/0, 4, /*num_pages=*/40, /*chunk=*/8);
    runner->seconds_of_a_token = seconds_of_a_token;
    PlanTrace* const kept = trace.get();
    EngineCore core(std::move(runner), with_depth({8, 32, 8, true, /*headroom=*/0}, 2), /*speculate=*/4,
                    std::move(trace));
    int64_t drafted = 0;
    for (int64_t id = 0; id < 12; ++id) {
      Request request{{id % 3, id / 3 % 3, id / 9, 2, 1, 2, 1}, params(60)};
      request.experts_per_token = 2;
      Callbacks callbacks;
      callbacks.on_end = [&drafted](Outcome outcome) {
        EXPECT_FALSE(outcome.error);
        drafted += outcome.timings.drafted_tokens;
      };
      core.add(std::make_unique<Sequence>(id, std::move(request), std::move(callbacks), std::nullopt));
    }
    while (!core.idle()) core.step();
    if (kept) kept->finish();
    EXPECT_GT(core.stats().preemptions, 0);
    return drafted;
  };
  const int64_t drafted = run(0.01, std::make_unique<PlanTrace>(file, PlanTrace::Mode::kWrite));
  EXPECT_NE(run(10, nullptr), drafted);
  EXPECT_EQ(run(10, std::make_unique<PlanTrace>(file, PlanTrace::Mode::kReplay)), drafted);
}

}  // namespace
}  // namespace mixtral
