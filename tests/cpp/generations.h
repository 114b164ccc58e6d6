// Requests and results that the tests of the engine share.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "engine/engine.h"
#include "engine/scheduler.h"
#include "tiny_model.h"

namespace mixtral {

using Prompts = std::vector<std::vector<int64_t>>;

inline SamplingParams params(int64_t max_tokens, double temperature = 0.0, uint64_t seed = 1) {
  SamplingParams out;
  out.max_tokens = max_tokens;
  out.temperature = temperature;
  out.seed = seed;
  out.logprobs = 2;
  out.ignore_eos = true;
  return out;
}

inline Scheduler::Options with_depth(Scheduler::Options options, int64_t depth) {
  options.depth = depth;
  return options;
}

inline Prompts some_prompts() { return {random_ids(13, 101, 1), random_ids(1, 101, 2), random_ids(30, 101, 3)}; }

inline std::vector<double> logprobs_of(const Generation& result) {
  std::vector<double> out;
  for (const auto& token : result.logprobs) out.push_back(token.logprob);
  return out;
}

inline void expect_same(const Generation& a, const Generation& b) {
  EXPECT_EQ(a.token_ids, b.token_ids);
  EXPECT_EQ(logprobs_of(a), logprobs_of(b));  // bit for bit
  EXPECT_EQ(a.finish_reason, b.finish_reason);
  EXPECT_EQ(a.text, b.text);
}

// The result of an engine that has nothing else to do.
inline Generation alone(const Mixtral& model, const std::vector<int64_t>& prompt, const SamplingParams& sampling) {
  return Engine(model, std::nullopt, {}).generate({prompt}, {sampling})[0];
}

}  // namespace mixtral
