#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>

#include "engine/sampling.h"

namespace mixtral {
namespace {

using Ids = std::vector<int64_t>;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

SamplingParams sampled(uint64_t seed = 1) {
  SamplingParams params;
  params.temperature = 1;
  params.seed = seed;
  return params;
}

int64_t next(Sampler& sampler, const std::vector<float>& logits) {
  return sampler.next(logits.data(), static_cast<int64_t>(logits.size()));
}

// How often each token comes out of `draws` steps.
std::map<int64_t, int> histogram(const SamplingParams& params, const std::vector<float>& logits, int draws) {
  Sampler sampler(params, {});
  std::map<int64_t, int> counts;
  for (int i = 0; i < draws; ++i) ++counts[next(sampler, logits)];
  return counts;
}

std::vector<int64_t> support(const SamplingParams& params, const std::vector<float>& logits) {
  std::vector<int64_t> ids;
  for (const auto& [id, count] : histogram(params, logits, 2000)) ids.push_back(id);
  return ids;
}

std::vector<float> log_of(std::vector<float> probabilities) {
  for (float& p : probabilities) p = std::log(p);
  return probabilities;
}

TEST(Sampler, GreedyTakesTheFirstOfEqualLogits) {
  Sampler sampler(SamplingParams{}, {});
  EXPECT_EQ(next(sampler, {1, 3, 3, 2}), 1);
  EXPECT_EQ(next(sampler, {-kInf, -5, -kInf}), 1);
  EXPECT_EQ(next(sampler, {7}), 0);
}

TEST(Sampler, DrawsFollowTheSoftmaxAtTheTemperature) {
  const std::vector<float> logits = {0, 1, 2, -1};
  for (const double temperature : {0.5, 1.0, 2.0}) {
    SamplingParams params = sampled();
    params.temperature = temperature;
    const int draws = 40000;
    auto counts = histogram(params, logits, draws);
    double total = 0;
    for (const float logit : logits) total += std::exp(logit / temperature);
    for (int64_t id = 0; id < 4; ++id) {
      const double p = std::exp(logits[static_cast<size_t>(id)] / temperature) / total;
      EXPECT_NEAR(counts[id], draws * p, 5 * std::sqrt(draws * p * (1 - p))) << temperature << " " << id;
    }
  }
}

TEST(Sampler, TinyTemperatureIsGreedyAndImpossibleTokensNeverCome) {
  SamplingParams params = sampled();
  params.temperature = 1e-300;
  EXPECT_EQ(support(params, {1, 2, 0}), (Ids{1}));
  EXPECT_EQ(support(sampled(), {-kInf, 0, -kInf, 0, -kInf}), (Ids{1, 3}));
}

TEST(Sampler, SameSeedSameTokensWhateverElseRuns) {
  std::mt19937 random(3);
  std::vector<std::vector<float>> steps(30, std::vector<float>(100));
  for (auto& logits : steps) {
    for (float& logit : logits) logit = std::normal_distribution<float>()(random);
  }
  const auto text = [&](uint64_t seed) {
    Sampler sampler(sampled(seed), {}), neighbour(sampled(seed + 1), {});
    std::vector<int64_t> ids;
    for (const auto& logits : steps) {
      ids.push_back(next(sampler, logits));
      next(neighbour, logits);
    }
    return ids;
  };
  for (int run = 0; run < 50; ++run) EXPECT_EQ(text(42), text(42));
  EXPECT_NE(text(42), text(43));
  EXPECT_NE(text(0), text(uint64_t{1} << 63));
  // Without a seed, two requests differ.
  SamplingParams params = sampled();
  params.seed.reset();
  Sampler a(params, {}), b(params, {});
  std::vector<int64_t> ids_a, ids_b;
  for (const auto& logits : steps) {
    ids_a.push_back(next(a, logits));
    ids_b.push_back(next(b, logits));
  }
  EXPECT_NE(ids_a, ids_b);
}

// Philox4x32-10: the known answers of its authors' library, Random123, for counter 0 and key 0, and for digits of pi.
TEST(Sampler, RandomNumbersAreThoseOfPhiloxForSeedAndPosition) {
  const auto uniform_of = [](uint64_t high, uint64_t low) {
    return static_cast<double>((high << 32 | low) >> 11) * 0x1p-53;
  };
  EXPECT_EQ(Sampler(sampled(0), {}).uniform(), uniform_of(0x6627e8d5, 0xe169c58d));
  EXPECT_EQ(sample_seed(7, 0), 7u);
  EXPECT_NE(sample_seed(7, 1), sample_seed(7, 2));
  EXPECT_NE(sample_seed(7, 1), sample_seed(8, 1));

  Sampler sampler(sampled(5), {1, 2});
  next(sampler, {0, 0});
  EXPECT_EQ(sampler.uniform(), Sampler(sampled(5), {1, 2, 0}).uniform());  // the fourth token
  EXPECT_NE(sampler.uniform(), Sampler(sampled(5), {1, 2}).uniform());
  EXPECT_NE(sampler.uniform(), Sampler(sampled(6), {1, 2, 0}).uniform());
}

TEST(Sampler, TopKTopPAndMinPKeepTheRightTokens) {
  const std::vector<float> logits = log_of({0.1f, 0.4f, 0.2f, 0.3f});
  SamplingParams params = sampled();
  params.top_k = 2;
  EXPECT_EQ(support(params, logits), (Ids{1, 3}));
  EXPECT_EQ(support(params, {5, 5, 5, 5}), (Ids{0, 1}));  // ties to the smaller id
  params.top_k = 100;
  EXPECT_EQ(support(params, logits), (Ids{0, 1, 2, 3}));

  params = sampled();
  params.top_p = 0.65;  // 0.4 + 0.3 reaches it
  EXPECT_EQ(support(params, logits), (Ids{1, 3}));
  params.top_p = 0.75;
  EXPECT_EQ(support(params, logits), (Ids{1, 2, 3}));
  params.top_p = 1e-9;
  EXPECT_EQ(support(params, logits), (Ids{1}));
  params.top_p = 0.55;  // of the two that top-k leaves, 0.4 / 0.7 reaches it; of all, it would take two
  params.top_k = 2;
  EXPECT_EQ(support(params, logits), (Ids{1}));

  params = sampled();
  params.min_p = 0.6;  // 0.24 and more
  EXPECT_EQ(support(params, logits), (Ids{1, 3}));
  params.min_p = 1;
  EXPECT_EQ(support(params, logits), (Ids{1}));
}

TEST(Sampler, TopPOverManyEqualTokensGoesPastTheFirstChunk) {
  SamplingParams params = sampled();
  params.top_p = 0.5;
  const auto ids = support(params, std::vector<float>(1000, 0.0f));
  EXPECT_GT(ids.size(), 400u);
  EXPECT_LE(ids.back(), 500);
}

// Equal tokens weigh exactly 1 each, so sums and shares are exact.
TEST(Sampler, TopPKeepsNoTokenMoreWhenTheShareIsReachedExactly) {
  SamplingParams params = sampled();
  params.top_p = 0.5;
  EXPECT_EQ(support(params, {3, 3, 3, 3}), (Ids{0, 1}));
  params.top_p = 0.25;
  EXPECT_EQ(support(params, {3, 3, 3, 3}), (Ids{0}));
  params.top_p = 0.75;
  EXPECT_EQ(support(params, {3, 3, 3, 3}), (Ids{0, 1, 2}));
}

TEST(Sampler, RepetitionPenaltyCoversPromptAndGeneratedIds) {
  SamplingParams params;
  params.repetition_penalty = 2;
  Sampler sampler(params, {0, 0, 99, -1});           // ids that the output layer lacks are nobody's business
  EXPECT_EQ(next(sampler, {3, 1.6f, 1.4f}), 1);      // 3 / 2 (once, though it occurs twice) < 1.6
  EXPECT_EQ(next(sampler, {3, 1.6f, 1.4f}), 0);      // 1.5, 0.8, 1.4
  EXPECT_EQ(next(sampler, {-1, -1.9f, -1.95f}), 2);  // a negative logit is multiplied: -2, -3.8
}

// As in OpenAI's API: score = logit - presence * (it was generated) - frequency * (how often), and bias is added.
TEST(Sampler, PresenceAndFrequencyPenaltyAndBiasAreOverGeneratedTokens) {
  SamplingParams params;
  params.presence_penalty = 0.5;
  params.frequency_penalty = 0.25;
  params.logit_bias = {{2, 0.125}, {999, 1}};  // an id that the output layer lacks is nobody's business
  Sampler sampler(params, {0, 0, 1});          // the prompt does not count
  const std::vector<float> logits = {3, 2.3125f, 1.625f};
  std::vector<double> scores = {3, 2.3125, 1.75};
  std::map<int64_t, int> count;
  for (int step = 0; step < 12; ++step) {
    const int64_t best = std::max_element(scores.begin(), scores.end()) - scores.begin();
    ASSERT_EQ(next(sampler, logits), best) << step;
    scores[static_cast<size_t>(best)] -= (count[best]++ == 0 ? 0.5 : 0) + 0.25;
  }
  EXPECT_EQ(count.size(), 3u);  // each penalty was felt
  params.presence_penalty = params.frequency_penalty = -1;
  Sampler loyal(params, {});
  EXPECT_EQ(next(loyal, {0, 1, 0}), 1);
  EXPECT_EQ(next(loyal, {2.5f, 1, 0}), 1);  // 1 + 1 + 1
}

TEST(Sampler, RepetitionPenaltyComesBeforeTheOthersAndTheBias) {
  SamplingParams params;
  params.repetition_penalty = 2;
  params.presence_penalty = 1;
  params.logit_bias = {{0, 0.5}};
  Sampler sampler(params, {0});
  EXPECT_EQ(next(sampler, {4, 2.75f}), 1);  // 4 / 2 + 0.5
  EXPECT_EQ(next(sampler, {4, 7}), 0);      // 2.5 against 7 / 2 - 1; ties to the smaller id
}

TEST(Sampler, ABiasStaysWhenItsTokenWasGenerated) {
  SamplingParams params;
  params.presence_penalty = 0.5;
  params.logit_bias = {{1, 3}};
  Sampler sampler(params, {});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(next(sampler, {0, 0}), 1);  // 3, then 3 - 0.5
}

TEST(Sampler, NoEndComesBeforeMinTokens) {
  for (const double temperature : {0.0, 1.0}) {
    SamplingParams params = sampled();
    params.temperature = temperature;
    params.min_tokens = 3;
    Sampler sampler(params, {1, 1, 1, 1}, {1, 2, 999});
    for (int i = 0; i < 3; ++i) EXPECT_EQ(next(sampler, {0, 90, 80}), 0);
    EXPECT_EQ(next(sampler, {0, 90, 20}), 1);
  }
}

TEST(Sampler, AMaskLeavesTheAllowedTokens) {
  // Tokens 0 and 33 of 40: bit 0 of the first word, bit 1 of the second.
  const std::vector<int32_t> mask = {1, 2};
  std::vector<float> logits(40, 5.0f);
  logits[0] = 1;
  logits[33] = 2;
  Sampler greedy(SamplingParams{}, {});
  EXPECT_EQ(greedy.next(logits.data(), 40, mask), 33);
  Sampler random(sampled(), {});
  std::map<int64_t, int> counts;
  for (int i = 0; i < 2000; ++i) ++counts[random.next(logits.data(), 40, mask)];
  EXPECT_EQ(counts.size(), 2u);
  EXPECT_NEAR(counts[33] / 2000.0, 1 / (1 + std::exp(-1)), 0.04);
  const std::vector<int32_t> last = {0, -1};  // bits behind the vocabulary too
  EXPECT_EQ(greedy.next(logits.data(), 33, {std::numeric_limits<int32_t>::min(), 0}), 31);
  EXPECT_EQ(greedy.next(logits.data(), 34, last), 32);
  EXPECT_THROW(greedy.next(logits.data(), 40, {0, 0}), std::runtime_error);
}

TEST(Sampler, BrokenLogitsAreAnError) {
  Sampler greedy(SamplingParams{}, {}), random(sampled(), {});
  for (Sampler* sampler : {&greedy, &random}) {
    EXPECT_THROW(next(*sampler, {1, kNan}), std::runtime_error);
    EXPECT_THROW(next(*sampler, {kInf, 1}), std::runtime_error);
    EXPECT_THROW(next(*sampler, {-kInf, -kInf}), std::runtime_error);
    EXPECT_THROW(next(*sampler, {}), std::runtime_error);
  }
  try {
    next(greedy, {1, 2, kNan});
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "sampling: logits must be finite or -inf, got nan for token 2");
  }
}

TEST(Logprobs, AreTheLogSoftmaxOfTheRawLogits) {
  const std::vector<float> logits = log_of({0.1f, 0.2f, 0.5f, 0.2f});
  const TokenLogprob result = token_logprob(logits.data(), 4, 0, 3);
  EXPECT_EQ(result.token_id, 0);
  EXPECT_NEAR(result.logprob, std::log(0.1), 1e-6);
  ASSERT_EQ(result.top.size(), 3u);
  EXPECT_EQ(result.top[0].first, 2);
  EXPECT_EQ(result.top[1].first, 1);  // ties to the smaller id
  EXPECT_EQ(result.top[2].first, 3);
  EXPECT_NEAR(result.top[0].second, std::log(0.5), 1e-6);
  EXPECT_TRUE(token_logprob(logits.data(), 4, 1, 0).top.empty());
  EXPECT_EQ(token_logprob(logits.data(), 4, 1, 20).top.size(), 4u);
  const std::vector<float> large = {1e30f, 1e30f};
  EXPECT_NEAR(token_logprob(large.data(), 2, 0, 0).logprob, -std::log(2.0), 1e-6);
  EXPECT_THROW(token_logprob(logits.data(), 4, 4, 0), std::out_of_range);
  const std::vector<float> broken = {0, kNan};
  EXPECT_THROW(token_logprob(broken.data(), 2, 0, 0), std::runtime_error);
}

TEST(SamplingParams, EachFieldIsCheckedAtItsBounds) {
  const auto error = [](auto change) -> std::string {
    SamplingParams params;
    change(params);
    try {
      params.validate();
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "ok";
  };
  using P = SamplingParams&;
  EXPECT_EQ(error([](P) {}), "ok");
  EXPECT_EQ(error([](P p) { p.max_tokens = 0; }), "max_tokens must be >= 1, got 0");
  EXPECT_EQ(error([](P p) { p.temperature = -0.1; }), "temperature must be finite and >= 0, got -0.1");
  EXPECT_EQ(error([](P p) { p.temperature = NAN; }), "temperature must be finite and >= 0, got nan");
  EXPECT_EQ(error([](P p) { p.temperature = INFINITY; }), "temperature must be finite and >= 0, got inf");
  EXPECT_EQ(error([](P p) { p.top_p = 0; }), "top_p must be in (0, 1], got 0");
  EXPECT_EQ(error([](P p) { p.top_p = 1.5; }), "top_p must be in (0, 1], got 1.5");
  EXPECT_EQ(error([](P p) { p.top_p = NAN; }), "top_p must be in (0, 1], got nan");
  EXPECT_EQ(error([](P p) { p.top_k = -1; }), "top_k must be >= 0, got -1");
  EXPECT_EQ(error([](P p) { p.min_p = -0.1; }), "min_p must be in [0, 1], got -0.1");
  EXPECT_EQ(error([](P p) { p.min_p = 1.1; }), "min_p must be in [0, 1], got 1.1");
  EXPECT_EQ(error([](P p) { p.min_p = 1; }), "ok");
  EXPECT_EQ(error([](P p) { p.repetition_penalty = 0; }), "repetition_penalty must be finite and > 0, got 0");
  EXPECT_EQ(error([](P p) { p.repetition_penalty = INFINITY; }), "repetition_penalty must be finite and > 0, got inf");
  EXPECT_EQ(error([](P p) { p.presence_penalty = 2.5; }), "presence_penalty must be in [-2, 2], got 2.5");
  EXPECT_EQ(error([](P p) { p.presence_penalty = NAN; }), "presence_penalty must be in [-2, 2], got nan");
  EXPECT_EQ(error([](P p) { p.frequency_penalty = -2.5; }), "frequency_penalty must be in [-2, 2], got -2.5");
  EXPECT_EQ(error([](P p) { p.frequency_penalty = -2; }), "ok");
  EXPECT_EQ(error([](P p) { p.logit_bias = {{3, 100}, {4, -100}}; }), "ok");
  EXPECT_EQ(error([](P p) { p.logit_bias = {{3, -100.5}}; }), "logit_bias must be in [-100, 100], got -100.5");
  EXPECT_EQ(error([](P p) { p.logit_bias = {{-3, 1}}; }), "logit_bias must be of token ids >= 0, got -3");
  EXPECT_EQ(error([](P p) { p.stop_token_ids = {1, -1}; }), "stop_token_ids must be token ids >= 0, got -1");
  EXPECT_EQ(error([](P p) { p.min_tokens = -1; }), "min_tokens must be >= 0, got -1");
  EXPECT_EQ(error([](P p) { p.prompt_logprobs = 21; }), "prompt_logprobs must be in [0, 20], got 21");
  EXPECT_EQ(error([](P p) { p.logprobs = 20; }), "ok");
  EXPECT_EQ(error([](P p) { p.logprobs = 21; }), "logprobs must be in [0, 20], got 21");
  EXPECT_EQ(error([](P p) { p.logprobs = -1; }), "logprobs must be in [0, 20], got -1");
  EXPECT_EQ(error([](P p) { p.stop = {"a", ""}; }), "stop must be strings that are not empty, got \"\"");
  SamplingParams bad;
  bad.top_k = -1;
  EXPECT_THROW(Sampler(bad, {}), std::invalid_argument);
}

}  // namespace
}  // namespace mixtral
