// The CUDA kernels around the expert products, on the emulated GPU: routing, permutation and norm.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "gpu_emulator/hopper.h"
// The kernels, after the building blocks.
#include "ops/moe_permute/moe_permute_kernels.cuh"
#include "ops/moe_route/moe_route_kernels.cuh"
#include "ops/rms_norm/rms_norm_kernels.cuh"

namespace mixtral::cuda {
namespace {

struct Permuted {
  std::vector<float> rows;
  std::vector<int32_t> offs, row_map;
};

// ids [T, K]; row t of x holds its own number in every column.
Permuted expected_permutation(const std::vector<int32_t>& ids, int64_t experts, int64_t top_k, int64_t hidden) {
  const int64_t copies = static_cast<int64_t>(ids.size());
  Permuted p{std::vector<float>(copies * hidden), std::vector<int32_t>(experts), std::vector<int32_t>(copies, -1)};
  int32_t row = 0;
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t i = 0; i < copies; ++i) {
      if (ids[i] != e) continue;
      std::fill_n(p.rows.begin() + row * hidden, hidden, static_cast<float>(i / top_k));
      p.row_map[i] = row++;
    }
    p.offs[e] = row;
  }
  return p;
}

Permuted run_permute(const std::vector<int32_t>& ids, int64_t experts, int64_t top_k, int64_t hidden, int64_t chunk,
                     uint64_t seed) {
  const int64_t copies = static_cast<int64_t>(ids.size());
  std::vector<float> x(copies / top_k * hidden);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i / hidden);
  Permuted p{std::vector<float>(copies * hidden, NAN), std::vector<int32_t>(experts, -7),
             std::vector<int32_t>(copies, -7)};
  const IndexArray array{ids.data(), /*is_int64=*/false};
  const unsigned blocks = static_cast<unsigned>((copies + chunk - 1) / chunk);
  emulator::launch({{blocks, 1, 1}, kPermuteThreads, static_cast<size_t>(permute_shared_bytes(experts)), seed}, [&] {
    moe_permute_chunk_kernel<float>(x.data(), array, p.rows.data(), p.offs.data(), p.row_map.data(), copies, top_k,
                                    experts, chunk, hidden);
  });
  return p;
}

void expect_permutation(const std::vector<int32_t>& ids, int64_t experts, int64_t top_k, uint64_t seed) {
  constexpr int64_t kHidden = 3;
  const Permuted expected = expected_permutation(ids, experts, top_k, kHidden);
  const int64_t copies = static_cast<int64_t>(ids.size());
  for (const int64_t chunk : {permute_chunk(copies), int64_t{kMaxChunk}, int64_t{5}}) {
    const Permuted actual = run_permute(ids, experts, top_k, kHidden, chunk, seed);
    EXPECT_EQ(actual.rows, expected.rows);
    EXPECT_EQ(actual.offs, expected.offs);
    EXPECT_EQ(actual.row_map, expected.row_map);
  }
}

TEST(MoePermuteKernel, SortsStablyWhateverTheRouting) {
  std::mt19937 random(0);
  for (const auto& [tokens, experts, top_k] :
       {std::array{1, 8, 2}, std::array{33, 8, 2}, std::array{7, 1, 1}, std::array{40, 70, 3}, std::array{150, 8, 2}}) {
    std::vector<int32_t> ids(tokens * top_k);
    for (auto& id : ids) id = static_cast<int32_t>(random() % experts);
    expect_permutation(ids, experts, top_k, tokens);
    std::fill(ids.begin(), ids.end(), experts - 1);  // all on one expert, the others empty
    expect_permutation(ids, experts, top_k, tokens);
  }
}

TEST(MoePermuteKernel, DropsBadIdsAndClearsTheRowsTheyLeave) {
  std::mt19937 random(1);
  std::vector<int32_t> ids(2 * 45);
  for (auto& id : ids) id = static_cast<int32_t>(random() % 8);
  ids[0] = -1;
  ids[31] = 8;
  ids[89] = INT32_MIN;
  expect_permutation(ids, 8, 2, 2);
}

TEST(MoePermuteKernel, FewCopiesSpreadOverManyBlocks) {
  EXPECT_EQ(permute_chunk(2), 1);
  EXPECT_EQ(permute_chunk(264), 1);
  EXPECT_EQ(permute_chunk(265), 2);
  EXPECT_EQ(permute_chunk(int64_t{1} << 31), kMaxChunk);
}

template <int kValues>
void expect_unpermute(const std::vector<int64_t>& index, int64_t bound, bool in_place, const std::vector<int>& rows) {
  constexpr int64_t kTokens = 3, kTopK = 2, kHidden = 1040, kRows = 6;
  std::vector<BFloat16> y(kRows * kHidden), out(kTokens * kHidden, BFloat16(NAN));
  for (size_t i = 0; i < y.size(); ++i) y[i] = static_cast<float>(i % 61) - 30;
  for (int row = 0; row < kRows; ++row) {
    if (std::count(rows.begin(), rows.end(), row) == 0)  // nobody's
      std::fill_n(y.begin() + row * kHidden, kHidden, BFloat16(NAN));
  }
  const std::vector<float> weights{0.25f, 0.75f, 0.5f, 0.5f, 1.0f, 3.0f};
  const CopyRows copy_rows{{index.data(), true}, bound, in_place};
  emulator::launch({{kTokens, 1, 1}, kPermuteThreads, 0, 0}, [&] {
    moe_unpermute_token_kernel<BFloat16, kValues>(y.data(), weights.data(), copy_rows, out.data(), kTopK, kHidden);
  });
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t h = 0; h < kHidden; ++h) {
      float sum = 0;
      for (int64_t i = t * kTopK; i < (t + 1) * kTopK; ++i)
        sum += rows[i] < 0 ? 0 : weights[i] * float(y[rows[i] * kHidden + h]);
      EXPECT_EQ(float(out[t * kHidden + h]), float(BFloat16(sum)));
    }
  }
}

TEST(MoeUnpermuteKernel, AddsInOrderAndSkipsDroppedCopies) {
  const std::vector<int64_t> row_map{3, 1, -1, 5, 6, -9};  // 6 is no row
  expect_unpermute<1>(row_map, 6, false, {3, 1, -1, 5, -1, -1});
  expect_unpermute<8>(row_map, 6, false, {3, 1, -1, 5, -1, -1});
}

TEST(MoeUnpermuteKernel, TakesCopiesInTheirPlacesAndSkipsThoseOfNoExpert) {
  const std::vector<int64_t> ids{3, 0, int64_t{1} << 32, 2, 4, -1};  // of 4 experts
  expect_unpermute<1>(ids, 4, true, {0, 1, -1, 3, -1, -1});
  expect_unpermute<8>(ids, 4, true, {0, 1, -1, 3, -1, -1});
}

struct Choice {
  std::vector<float> weights;
  std::vector<int32_t> ids;
  bool operator==(const Choice& other) const { return weights == other.weights && ids == other.ids; }
};

template <typename R, int kTokens, int kValues>
Choice run_route(const std::vector<BFloat16>& x, const std::vector<R>& router, int64_t hidden, int experts, int top_k,
                 const std::vector<float>& bias = {}) {
  const int64_t tokens = static_cast<int64_t>(x.size()) / hidden;
  Choice choice{std::vector<float>(tokens * top_k, NAN), std::vector<int32_t>(tokens * top_k, -7)};
  const unsigned blocks = static_cast<unsigned>((tokens + kTokens - 1) / kTokens);
  emulator::launch({{blocks, 1, 1}, kRouteThreads, static_cast<size_t>(route_shared_bytes(kTokens, experts)), 5}, [&] {
    moe_route_kernel<BFloat16, R, kTokens, kValues>(x.data(), router.data(), bias.empty() ? nullptr : bias.data(),
                                                    {nullptr, choice.weights.data(), choice.ids.data()}, tokens, hidden,
                                                    experts, top_k, true);
  });
  return choice;
}

TEST(MoeRouteKernel, ChoosesTheBestExpertsAndDoesNotDependOnTheBlock) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (const int experts : {8, 3, 19}) {
    constexpr int64_t kTokens = 7, kHidden = 1100;
    const int top_k = 2;
    std::vector<BFloat16> x(kTokens * kHidden);
    std::vector<float> router(experts * kHidden);
    for (auto& value : x) value = normal(random);
    for (auto& value : router) value = normal(random) / 16;
    const Choice choice = run_route<float, 1, 4>(x, router, kHidden, experts, top_k);
    EXPECT_TRUE(choice == (run_route<float, 4, 4>(x, router, kHidden, experts, top_k)));
    const Choice single = run_route<float, 4, 1>(x, router, kHidden, experts, top_k);
    for (int64_t t = 0; t < kTokens; ++t) {
      std::vector<double> logits(experts);
      for (int e = 0; e < experts; ++e) {
        for (int64_t h = 0; h < kHidden; ++h) logits[e] += double(float(x[t * kHidden + h])) * router[e * kHidden + h];
      }
      std::vector<int> order(experts);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
      const double first = 1 / (1 + std::exp(logits[order[1]] - logits[order[0]]));
      for (const Choice& c : {choice, single}) {
        EXPECT_EQ(c.ids[t * top_k], order[0]);
        EXPECT_EQ(c.ids[t * top_k + 1], order[1]);
        EXPECT_NEAR(c.weights[t * top_k], first, 1e-5);
        EXPECT_NEAR(c.weights[t * top_k + 1], 1 - first, 1e-5);
      }
    }
  }
}

TEST(MoeRouteKernel, ModelDtypeRoundsTheLogits) {
  constexpr int64_t kHidden = 64;
  // Logits 256 and 257: the same in bf16, where the smaller id wins.
  std::vector<BFloat16> x(kHidden, BFloat16(1.0f)), router(2 * kHidden, BFloat16(4.0f));
  router[kHidden] = 5.0f;
  const Choice rounded = run_route<BFloat16, 1, 4>(x, router, kHidden, 2, 1);
  EXPECT_EQ(rounded.ids, std::vector<int32_t>{0});
  const std::vector<float> wide(router.begin(), router.end());
  EXPECT_EQ((run_route<float, 1, 4>(x, wide, kHidden, 2, 1).ids), std::vector<int32_t>{1});
}

TEST(MoeRouteKernel, BiasMovesTheChoiceAndNotTheWeights) {
  constexpr int64_t kHidden = 4;
  const std::vector<BFloat16> x(kHidden, BFloat16(1.0f));
  std::vector<float> router(3 * kHidden, 0.0f);
  router[kHidden] = 1.0f;  // logits 0, 1, 0
  const Choice choice = run_route<float, 1, 4>(x, router, kHidden, 3, 2, {0.0f, -1.0f, 0.1f});
  EXPECT_EQ(choice.ids, (std::vector<int32_t>{2, 0}));
  EXPECT_EQ(choice.weights, (std::vector<float>{0.5f, 0.5f}));
}

TEST(MoeRouteKernel, LeavesTheLogitsAlone) {
  constexpr int64_t kTokens = 5, kHidden = 40;
  constexpr int kExperts = 3;
  std::vector<BFloat16> x(kTokens * kHidden, BFloat16(1.0f));
  std::vector<float> router(kExperts * kHidden, 0.25f), logits(kTokens * kExperts, NAN);
  router[2 * kHidden] = 8.0f;
  emulator::launch({{2, 1, 1}, kRouteThreads, static_cast<size_t>(route_shared_bytes(4, kExperts)), 5}, [&] {
    moe_route_kernel<BFloat16, float, 4, 4>(x.data(), router.data(), nullptr, {logits.data(), nullptr, nullptr},
                                            kTokens, kHidden, kExperts, 0, false);
  });
  for (int64_t i = 0; i < kTokens * kExperts; ++i) EXPECT_EQ(logits[i], i % kExperts == 2 ? 17.75f : 10.0f);
}

TEST(RmsNormKernel, NormsTheRoundedSumAtEveryVectorSize) {
  constexpr int64_t kRows = 2, kHidden = 2088;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<BFloat16> x(kRows * kHidden), residual(x.size()), weight(kHidden);
  for (auto* values : {&x, &residual, &weight}) {
    for (auto& value : *values) value = normal(random);
  }
  const auto run = [&](auto kernel) {
    std::vector<BFloat16> out(x.size(), BFloat16(NAN)), sum(x.size(), BFloat16(NAN));
    emulator::launch({{kRows, 1, 1}, kNormThreads, 0, 0},
                     [&] { kernel(x.data(), residual.data(), weight.data(), out.data(), sum.data(), kHidden, 1e-5f); });
    for (int64_t r = 0; r < kRows; ++r) {
      double squares = 0;
      for (int64_t h = 0; h < kHidden; ++h) {
        const float total = float(BFloat16(float(x[r * kHidden + h]) + float(residual[r * kHidden + h])));
        EXPECT_EQ(float(sum[r * kHidden + h]), total);
        squares += double(total) * total;
      }
      const double scale = 1 / std::sqrt(squares / kHidden + 1e-5);
      for (int64_t h = 0; h < kHidden; ++h) {
        const double expected = float(sum[r * kHidden + h]) * scale * float(weight[h]);
        EXPECT_NEAR(float(out[r * kHidden + h]), expected, std::abs(expected) / 64 + 1e-6);
      }
    }
  };
  run(rms_norm_row_kernel<BFloat16, 8>);
  run(rms_norm_row_kernel<BFloat16, 1>);
}

}  // namespace
}  // namespace mixtral::cuda
