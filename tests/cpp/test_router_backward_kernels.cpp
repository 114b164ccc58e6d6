// The CUDA kernels for the gradients of routing, permutation and the router's losses, on the emulated GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "gpu_emulator/hopper.h"
// The kernels, after the building blocks.
#include "ops/host_device.h"
#include "ops/moe_permute/moe_permute_kernels.cuh"
#include "ops/moe_route/moe_route_kernels.cuh"
#include "ops/router_losses/router_losses_kernels.cuh"
#include "ops/topk_softmax/topk_softmax_kernels.cuh"

namespace mixtral::cuda {
namespace {

std::vector<float> random_values(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (auto& value : values) value = normal(random);
  return values;
}

// f64 softmax of row t of logits [T, E], and log sum exp.
std::vector<double> softmax(const std::vector<float>& logits, int64_t t, int experts, double* lse = nullptr) {
  std::vector<double> p(experts);
  double total = 0;
  for (int e = 0; e < experts; ++e) total += p[e] = std::exp(double(logits[t * experts + e]));
  for (double& x : p) x /= total;
  if (lse) *lse = std::log(total);
  return p;
}

TEST(TopkSoftmax, SharesAmongChosenExpertsFarBelowTheLargest) {
  const auto weights_of = [](const std::array<float, 3>& row, const std::array<float, 3>& bias) {
    std::array<float, 2> weights{};
    std::array<int32_t, 2> ids{};
    emulator::launch({{1, 1, 1}, kWarpSize, 0, 3},
                     [&] { warp_topk_softmax(row.data(), bias.data(), weights.data(), ids.data(), 3, 2, true); });
    return weights;
  };
  const float share = 1.0f / (1.0f + std::exp(-1.0f));
  const std::array<float, 2> low = weights_of({0, -200, -201}, {-9, 0, 0});  // their probabilities are zero in f32
  EXPECT_NEAR(low[0], share, 1e-6);
  EXPECT_NEAR(low[1], 1.0f - share, 1e-6);
  const std::array<float, 2> rising = weights_of({0, -2, -1}, {-9, 1, 0});  // the larger logit is chosen second
  EXPECT_NEAR(rising[1], share, 1e-6);
  EXPECT_EQ(weights_of({-INFINITY, 0, -200}, {1, -9, 1}), (std::array<float, 2>{0, 1}));
}

void expect_topk_softmax_backward(int64_t tokens, int experts, int top_k, bool renormalize) {
  const std::vector<float> logits = random_values(tokens * experts, 1), grad = random_values(tokens * top_k, 2);
  std::vector<float> weights(tokens * top_k), out(tokens * experts, NAN);
  std::vector<int64_t> ids(tokens * top_k);
  for (int64_t i = 0; i < tokens * top_k; ++i) ids[i] = (i / top_k * 3 + i % top_k * 5) % experts;  // distinct in a row
  std::vector<double> expected(tokens * experts, 0.0);
  for (int64_t t = 0; t < tokens; ++t) {
    const std::vector<double> p = softmax(logits, t, experts);
    double chosen = 0, mean = 0;
    for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) chosen += p[ids[i]];
    for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
      weights[i] = static_cast<float>(p[ids[i]] / (renormalize ? chosen : 1));
      mean += double(grad[i]) * weights[i];
    }
    for (int e = 0; e < experts && !renormalize; ++e) expected[t * experts + e] = -p[e] * mean;
    for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i)
      expected[t * experts + ids[i]] = weights[i] * (grad[i] - mean);
  }
  const auto blocks = static_cast<unsigned>(ceil_div(tokens, kTopkThreads / kWarpSize));
  emulator::launch({{blocks, 1, 1}, kTopkThreads, 0, 3}, [&] {
    topk_softmax_backward_kernel(grad.data(), logits.data(), weights.data(), IndexArray{ids.data(), true}, out.data(),
                                 tokens, experts, top_k, renormalize);
  });
  for (size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(out[i], expected[i], 1e-6);
}

TEST(TopkSoftmaxBackwardKernel, IsTheClosedForm) {
  for (const bool renormalize : {true, false}) {
    expect_topk_softmax_backward(1, 1, 1, renormalize);
    expect_topk_softmax_backward(7, 8, 2, renormalize);
    expect_topk_softmax_backward(5, 71, 3, renormalize);
  }
}

TEST(RouterLogitsBackwardKernels, MultiplyByTheRouterAndByTheTokens) {
  for (const auto& [tokens, hidden, experts] : {std::array{1, 1, 1}, std::array{21, 70, 19}, std::array{3, 300, 8}}) {
    const std::vector<float> grad = random_values(tokens * experts, 1), x = random_values(tokens * hidden, 2);
    const std::vector<float> router = random_values(experts * hidden, 3);
    std::vector<float> grad_x(x.size(), NAN), grad_router(router.size(), NAN);
    const auto count = [](int64_t a, int64_t b) { return static_cast<unsigned>(ceil_div(a, b)); };
    emulator::launch({{static_cast<unsigned>(tokens), count(hidden, kRouteThreads), 1}, kRouteThreads, 0, 4}, [&] {
      router_logits_backward_x_kernel(grad.data(), router.data(), grad_x.data(), hidden, experts);
    });
    emulator::launch(
        {{count(hidden, kWarpSize), count(experts, kRouteExperts), 1}, kRouteThreads, kRouterGradBytes, 5}, [&] {
          router_logits_backward_router_kernel(grad.data(), x.data(), grad_router.data(), tokens, hidden, experts);
        });
    for (int64_t h = 0; h < hidden; ++h) {
      for (int64_t t = 0; t < tokens; ++t) {
        double sum = 0;
        for (int64_t e = 0; e < experts; ++e) sum += double(grad[t * experts + e]) * router[e * hidden + h];
        EXPECT_NEAR(grad_x[t * hidden + h], sum, 2e-5);
      }
      for (int64_t e = 0; e < experts; ++e) {
        double sum = 0;
        for (int64_t t = 0; t < tokens; ++t) sum += double(grad[t * experts + e]) * x[t * hidden + h];
        EXPECT_NEAR(grad_router[e * hidden + h], sum, 2e-5);
      }
    }
  }
}

TEST(MoeUnpermuteBackwardKernel, ScalesRowsAndMultipliesGradientsWithOutputs) {
  constexpr int64_t kTokens = 3, kTopK = 2, kHidden = 300, kRows = 6;
  const std::vector<float> grad = random_values(kTokens * kHidden, 1), y = random_values(kRows * kHidden, 2);
  const std::vector<float> weights = random_values(kTokens * kTopK, 3);
  const std::vector<int32_t> row_map{3, 1, -1, 5, 0, 4};
  std::vector<float> grad_y(y.size(), 7.0f), grad_weights(weights.size(), NAN);
  const CopyRows rows{{row_map.data(), false}, kRows, false};
  emulator::launch({{kTokens, 1, 1}, kPermuteThreads, 0, 6}, [&] {
    moe_unpermute_backward_token_kernel(grad.data(), y.data(), weights.data(), rows, grad_y.data(), grad_weights.data(),
                                        kTopK, kHidden);
  });
  for (int64_t i = 0; i < kTokens * kTopK; ++i) {
    double dot = 0;
    for (int64_t h = 0; h < kHidden && row_map[i] >= 0; ++h) {
      const float g = grad[i / kTopK * kHidden + h];
      EXPECT_EQ(grad_y[row_map[i] * kHidden + h], weights[i] * g);
      dot += double(g) * y[row_map[i] * kHidden + h];
    }
    EXPECT_NEAR(grad_weights[i], dot, 2e-5);
  }
  for (int64_t h = 0; h < kHidden; ++h) EXPECT_EQ(grad_y[2 * kHidden + h], 7.0f);  // nobody's row: the host clears it
}

TEST(RouterLossesKernels, SkipMaskedTokensForwardAndBack) {
  for (const auto& [tokens, experts, top_k] : {std::array{1, 1, 1}, std::array{37, 8, 2}, std::array{300, 35, 3}}) {
    std::vector<float> logits = random_values(tokens * experts, 1);
    const std::vector<float> grad_prob = random_values(experts, 2);
    const float grad_z = 0.5f;
    std::vector<int32_t> ids(tokens * top_k);
    const auto mask = std::make_unique<bool[]>(tokens);
    for (int64_t i = 0; i < tokens * top_k; ++i) ids[i] = static_cast<int32_t>(i * 7 % experts);
    for (int64_t t = 0; t < tokens; ++t) mask[t] = t % 3 != 1;
    for (int64_t t = 1; t < tokens; t += 3) std::fill_n(logits.begin() + t * experts, experts, NAN);
    std::vector<float> probabilities(logits.size(), NAN), lse(tokens, NAN), prob_sum(experts, NAN), z_sum(1, NAN);
    std::vector<float> grads(logits.size(), NAN);
    std::vector<int64_t> load(experts, -7), count(1, -7);
    const auto blocks = static_cast<unsigned>(ceil_div(tokens, kLossThreads / kWarpSize));
    emulator::launch({{blocks, 1, 1}, kLossThreads, 0, 7}, [&] {
      router_probabilities_kernel(logits.data(), mask.get(), probabilities.data(), lse.data(), tokens, experts);
    });
    emulator::launch({{static_cast<unsigned>(experts + 1), 1, 1}, kLossThreads, 0, 8}, [&] {
      router_sums_kernel<kLossThreads>(probabilities.data(), lse.data(), IndexArray{ids.data(), false}, mask.get(),
                                       {load.data(), prob_sum.data(), z_sum.data(), count.data()}, tokens, experts,
                                       top_k);
    });
    emulator::launch({{blocks, 1, 1}, kLossThreads, 0, 9}, [&] {
      router_losses_backward_kernel(grad_prob.data(), &grad_z, logits.data(), mask.get(), grads.data(), tokens,
                                    experts);
    });
    std::vector<double> expected_prob(experts, 0.0);
    std::vector<int64_t> expected_load(experts, 0);
    double expected_z = 0;
    int64_t expected_count = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      if (!mask[t]) {
        for (int e = 0; e < experts; ++e) EXPECT_EQ(grads[t * experts + e], 0.0f);
        continue;
      }
      double row_lse = 0, mean = 0;
      const std::vector<double> p = softmax(logits, t, experts, &row_lse);
      for (int e = 0; e < experts; ++e) mean += grad_prob[e] * p[e];
      for (int e = 0; e < experts; ++e) {
        expected_prob[e] += p[e];
        EXPECT_NEAR(grads[t * experts + e], p[e] * (grad_prob[e] - mean + 2 * grad_z * row_lse), 2e-6);
      }
      for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) ++expected_load[ids[i]];
      expected_z += row_lse * row_lse;
      ++expected_count;
    }
    EXPECT_EQ(load, expected_load);
    EXPECT_EQ(count[0], expected_count);
    EXPECT_NEAR(z_sum[0], expected_z, 1e-5 * expected_z + 1e-6);
    for (int e = 0; e < experts; ++e) EXPECT_NEAR(prob_sum[e], expected_prob[e], 1e-5 * expected_prob[e]);
  }
}

}  // namespace
}  // namespace mixtral::cuda
