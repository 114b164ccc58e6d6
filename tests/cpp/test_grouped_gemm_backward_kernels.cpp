// The CUDA kernels of the gradients of a grouped product, on the emulated GPU, against plain loops.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "gpu_emulator/hopper.h"
// The kernels, after the building blocks.
#include "ops/grouped_gemm/grouped_gemm_backward_kernels.cuh"

namespace mixtral::cuda {
namespace {

// Small integers: sums are exact, whatever their order.
template <typename T>
std::vector<T> numbers(int64_t count, int64_t salt) {
  std::vector<T> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>((i * 7 + salt + i / 13) % 5 - 2);
  return values;
}

struct Problem {
  std::vector<int64_t> offs;
  int64_t rows, columns, depth;  // M, N, Kdim

  int64_t experts() const { return static_cast<int64_t>(offs.size()); }
  IndexArray ends() const { return {offs.data(), true}; }
  // The expert of row m, or experts() for a row after the last group. Decreasing ends give empty groups.
  int64_t expert_of(int64_t m) const {
    int64_t begin = 0;
    for (int64_t e = 0; e < experts(); ++e) {
      const int64_t end = group_end(ends(), e, begin, rows);
      if (m < end) return e;
      begin = end;
    }
    return experts();
  }
};

template <typename T>
void expect_input_gradient(const Problem& p) {
  const auto grad = numbers<T>(p.rows * p.columns, 1), b = numbers<T>(p.experts() * p.columns * p.depth, 3);
  std::vector<T> out(p.rows * p.depth, T(NAN));
  const WeightView view{WeightFormat::kTransposed, b.data(), p.experts(), p.depth, p.columns};
  const GroupedGemm<T> gemm{grad.data(), view, p.ends(), out.data(), p.rows};
  const auto tiles =
      static_cast<unsigned>(max_gemm_tiles(p.experts(), p.rows, kBackwardTile, ceil_div(p.depth, kBackwardTile)));
  emulator::launch({{tiles, 1, 1}, kBackwardThreads, static_cast<size_t>(kBackwardSharedBytes), 0},
                   [&] { grouped_gemm_backward_input_kernel<T>(gemm); });
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t k = 0; k < p.depth; ++k) {
      const int64_t e = p.expert_of(m);
      float sum = 0;
      for (int64_t n = 0; e < p.experts() && n < p.columns; ++n)
        sum += float(grad[m * p.columns + n]) * float(b[(e * p.columns + n) * p.depth + k]);
      ASSERT_EQ(float(out[m * p.depth + k]), float(T(sum))) << "row " << m << ", column " << k;
    }
}

template <typename T>
void expect_weight_gradient(const Problem& p) {
  const auto grad = numbers<T>(p.rows * p.columns, 1), a = numbers<T>(p.rows * p.depth, 2);
  std::vector<T> out(p.experts() * p.columns * p.depth, T(NAN));
  std::vector<float> expected(out.size());
  for (int64_t m = 0; m < p.rows; ++m) {
    const int64_t e = p.expert_of(m);
    for (int64_t n = 0; e < p.experts() && n < p.columns; ++n)
      for (int64_t k = 0; k < p.depth; ++k)
        expected[(e * p.columns + n) * p.depth + k] += float(grad[m * p.columns + n]) * float(a[m * p.depth + k]);
  }
  const GroupedGemmWeightGradient<T> gradient{grad.data(), a.data(),    p.ends(),  out.data(),
                                              p.rows,      p.experts(), p.columns, p.depth};
  const auto tiles =
      static_cast<unsigned>(p.experts() * ceil_div(p.columns, kBackwardTile) * ceil_div(p.depth, kBackwardTile));
  emulator::launch({{tiles, 1, 1}, kBackwardThreads, static_cast<size_t>(kBackwardSharedBytes), 0},
                   [&] { grouped_gemm_backward_weight_kernel<T>(gradient); });
  for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(float(out[i]), float(T(expected[i]))) << "value " << i;
}

TEST(GroupedGemmBackwardKernels, EqualPlainLoopsForEveryCutOfTheRows) {
  const std::vector<Problem> problems = {
      {{1}, 1, 1, 1},        {{0, 3, 3}, 3, 5, 7}, {{2, 70, 130}, 130, 66, 65},
      {{300}, 300, 17, 70},  {{5, 2, 9}, 9, 4, 3},  // decreasing
      {{3, 6}, 9, 4, 70},                           // rows after the last group
      {{4, 1000}, 9, 66, 3}, {{0, 0}, 70, 3, 3},    // beyond the rows; no rows at all
  };
  for (const Problem& problem : problems) {
    expect_input_gradient<float>(problem);
    expect_input_gradient<BFloat16>(problem);
    expect_weight_gradient<float>(problem);
    expect_weight_gradient<BFloat16>(problem);
  }
}

TEST(GroupedGemmBackwardKernels, AddInChains) {
  constexpr int64_t kDepth = 600;
  std::vector<float> grad(kDepth), a(kDepth, 1.0f), out(1, NAN);
  for (int64_t m = 0; m < kDepth; ++m) grad[m] = 1.0f + static_cast<float>(m % 97) / 300;
  float expected = 0;
  for (int64_t begin = 0; begin < kDepth; begin += kChainDepth) {
    float chain = 0;
    for (int64_t m = begin; m < least(begin + kChainDepth, kDepth); ++m) chain += grad[m];
    expected += chain;
  }
  const int64_t offs[] = {kDepth};
  const GroupedGemmWeightGradient<float> gradient{grad.data(), a.data(), {offs, true}, out.data(), kDepth, 1, 1, 1};
  emulator::launch({{1, 1, 1}, kBackwardThreads, static_cast<size_t>(kBackwardSharedBytes), 0},
                   [&] { grouped_gemm_backward_weight_kernel<float>(gradient); });
  EXPECT_EQ(out[0], expected);
}

}  // namespace
}  // namespace mixtral::cuda
