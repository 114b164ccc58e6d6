// sample_batch picks what Sampler::next picks: here on the CPU, where both run.
#include <gtest/gtest.h>

#include <limits>
#include <set>

#include "engine/sample_batch.h"

namespace mixtral {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kVocab = 211;

SamplingParams make(double temperature, int64_t top_k, double top_p, double min_p, double penalty) {
  SamplingParams params;
  params.temperature = temperature;
  params.top_k = top_k;
  params.top_p = top_p;
  params.min_p = min_p;
  params.repetition_penalty = penalty;
  return params;
}

std::vector<SamplingParams> mixed_params() {
  std::vector<SamplingParams> all = {make(0, 0, 1, 0, 1), make(0, 5, 0.5, 0, 1.3), make(1e-300, 0, 1, 0, 1)};
  for (const int64_t top_k : {0, 1, 7, 210, 211, 500})
    for (const double top_p : {1.0, 0.95, 0.3, 1e-9})
      for (const double min_p : {0.0, 0.2, 1.0})
        all.push_back(make(top_k % 2 ? 0.6 : 1.7, top_k, top_p, min_p, top_p == 0.95 ? 1.5 : 1));
  for (size_t i = 0; i < all.size(); ++i) {
    SamplingParams& params = all[i];
    params.seed = 100 + i;
    if (i % 3 == 1) params.presence_penalty = 1.3, params.frequency_penalty = -0.7;
    if (i % 4 == 2) params.logit_bias = {{static_cast<int64_t>(i), 7.3}, {5, -100}, {kVocab + 3, 50}};
    if (i % 5 == 3) params.min_tokens = 40;
  }
  return all;
}

// Logits on a coarse grid: many ties, some -inf.
torch::Tensor logits_with_ties(int64_t rows, torch::Generator generator) {
  auto logits = torch::randint(-12, 13, {rows, kVocab}, generator, torch::kFloat32) / 4;
  logits.masked_fill_(torch::rand({rows, kVocab}, generator) < 0.05, -kInf);
  return logits;
}

TEST(SampleBatch, PicksTheTokensOfSamplerNext) {
  const auto params = mixed_params();
  std::vector<Sampler> one_by_one, together;
  std::vector<Sampler*> samplers;
  for (const SamplingParams& own : params) {
    for (auto* list : {&one_by_one, &together})
      list->emplace_back(own, std::vector<int64_t>{1, 2, 3, -1, kVocab}, std::vector<int64_t>{5, 6, -2, kVocab});
  }
  for (Sampler& sampler : together) samplers.push_back(&sampler);
  const auto rows = static_cast<int64_t>(params.size());
  auto generator = torch::make_generator<torch::CPUGeneratorImpl>(7);
  for (int step = 0; step < 60; ++step) {
    const auto logits =
        step % 2 ? logits_with_ties(rows, generator) : torch::randn({rows, kVocab}, generator, torch::kFloat32) * 3;
    const auto ids = sample_batch(logits, samplers);
    for (int64_t row = 0; row < rows; ++row) {
      const auto expected = one_by_one[static_cast<size_t>(row)].next(logits[row].data_ptr<float>(), kVocab);
      ASSERT_EQ(ids[static_cast<size_t>(row)], expected) << "step " << step << ", row " << row;
    }
  }
}

TEST(SampleBatch, GreedyTakesTheFirstOfEqualLogits) {
  Sampler a(SamplingParams{}, {}), b(SamplingParams{}, {});
  EXPECT_EQ(sample_batch(torch::tensor({{1.f, 3.f, 3.f, 2.f}, {-kInf, -kInf, -5.f, -5.f}}), {&a, &b}),
            (std::vector<int64_t>{1, 2}));
}

TEST(SampleBatch, TopPKeepsNoTokenMoreWhenTheShareIsReachedExactly) {
  auto params = make(1, 0, 0.5, 0, 1);
  std::set<int64_t> seen;
  for (params.seed = 0; *params.seed < 200; ++*params.seed) {
    Sampler sampler(params, {});
    seen.insert(sample_batch(torch::full({1, 4}, 3.f), {&sampler})[0]);
  }
  EXPECT_EQ(seen, (std::set<int64_t>{0, 1}));
}

TEST(SampleBatch, ARowThatCannotBeSampledIsLeftAloneWithItsSampler) {
  for (const double temperature : {0.0, 1.0}) {
    const auto params = [&] {
      auto params = make(temperature, 2, 0.9, 0, 1);
      params.presence_penalty = 1;
      params.seed = 5;
      return params;
    }();
    std::vector<Sampler> samplers(5, Sampler(params, {}));
    Sampler fresh(params, {});
    const auto logits =
        torch::tensor({{0.f, 1.f, 2.f}, {0.f, kNan, 2.f}, {0.f, kInf, kNan}, {-kInf, -kInf, -kInf}, {2.f, kInf, 1.f}});
    const auto ids = sample_batch(logits, {&samplers[0], &samplers[1], &samplers[2], &samplers[3], &samplers[4]});
    EXPECT_EQ(ids[0], fresh.next(logits[0].data_ptr<float>(), 3));
    for (size_t row = 1; row < 5; ++row) {
      EXPECT_EQ(ids[row], -1);
      EXPECT_THROW(samplers[row].next(logits[static_cast<int64_t>(row)].data_ptr<float>(), 3), std::runtime_error);
      EXPECT_EQ(samplers[row].uniform(), Sampler(params, {}).uniform());
      EXPECT_TRUE(samplers[row].adjustments().empty());
    }
    EXPECT_EQ(samplers[0].adjustments().at(ids[0]).count, 1);
  }
}

}  // namespace
}  // namespace mixtral
