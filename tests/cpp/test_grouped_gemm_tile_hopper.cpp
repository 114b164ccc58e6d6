// The grouped product for many rows on Hopper, on the emulated GPU: every value of out is its own product, bit for bit.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "gpu_emulator/wgmma.h"
// The kernel, behind the building blocks.
#include "ops/grouped_gemm/hopper/grouped_gemm_tile_hopper.cuh"
#include "ops/grouped_gemm/hopper/grouped_gemm_tile_hopper.h"

namespace mixtral::cuda {
namespace {

constexpr int64_t kGuard = 1024;  // values around out, which nobody may write

// out [rows, columns] of groups that end at `offs`
struct Problem {
  std::vector<int64_t> offs;
  int64_t rows, columns, depth;
  bool swiglu;
  std::vector<BFloat16> a, b;  // small integers and sixteenths: sums are exact

  Problem(std::vector<int64_t> group_ends, int64_t m, int64_t n, int64_t k, bool with_swiglu)
      : offs(std::move(group_ends)), rows(m), columns(n), depth(k), swiglu(with_swiglu) {
    std::mt19937 random(1);
    a.resize(rows * depth);
    b.resize(experts() * b_columns() * depth);
    for (auto& x : a) x = static_cast<float>(static_cast<int>(random() % 9) - 4);
    for (auto& x : b) x = static_cast<float>(static_cast<int>(random() % 9) - 4) / 16;
  }

  int64_t experts() const { return static_cast<int64_t>(offs.size()); }
  int64_t b_columns() const { return swiglu ? 2 * columns : columns; }

  GroupedGemm<BFloat16> gemm(BFloat16* out) const {
    return {a.data(), {WeightFormat::kPlain, b.data(), experts(), b_columns(), depth}, {offs.data(), true}, out, rows};
  }

  // The expert of each row; experts() behind the last group.
  std::vector<int64_t> expert_of_row() const {
    std::vector<int64_t> expert(rows, experts());
    int64_t begin = 0;
    for (int64_t e = 0; e < experts(); ++e) {
      const int64_t end = std::clamp(offs[e], begin, std::max(begin, rows));
      for (; begin < end; ++begin) expert[begin] = e;
    }
    return expert;
  }

  float product(int64_t row, int64_t expert, int64_t column) const {
    float sum = 0;
    const BFloat16 *left = &a[row * depth], *right = &b[(expert * b_columns() + column) * depth];
    for (int64_t k = 0; k < depth; ++k) sum += static_cast<float>(left[k]) * static_cast<float>(right[k]);
    return static_cast<float>(BFloat16(sum));
  }

  std::vector<BFloat16> expected() const {
    std::vector<BFloat16> out(rows * columns, BFloat16(0.0f));
    const std::vector<int64_t> experts_of_rows = expert_of_row();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t e = experts_of_rows[r];
      for (int64_t c = 0; c < columns && e < experts(); ++c) {
        const float value = product(r, e, c);
        out[r * columns + c] = swiglu ? value / (1.0f + std::exp(-value)) * product(r, e, columns + c) : value;
      }
    }
    return out;
  }

  // Out between guards, all NaN before; bad bounds throw.
  std::vector<BFloat16> run(unsigned blocks, uint64_t seed, bool int64_offs = true) const {
    std::vector<BFloat16> out(rows * columns + 2 * kGuard, BFloat16(NAN));
    GroupedGemm<BFloat16> work = gemm(out.data() + kGuard);
    EXPECT_TRUE(takes_grouped_gemm_tile_hopper(work, swiglu));
    const std::vector<int32_t> narrow(offs.begin(), offs.end());
    if (!int64_offs) work.offs = {narrow.data(), false};
    TensorMap left, right;
    EXPECT_TRUE(encode_gemm_maps(work, &left, &right));
    emulator::launch({{blocks, 1, 1}, kGemmThreads, sizeof(GemmShared), seed}, [&] {
      swiglu ? grouped_gemm_tile_kernel<true>(left, right, work) : grouped_gemm_tile_kernel<false>(left, right, work);
    });
    for (int64_t i = 0; i < kGuard; ++i) {
      EXPECT_TRUE(std::isnan(static_cast<float>(out[i]))) << "written before out";
      EXPECT_TRUE(std::isnan(static_cast<float>(out[out.size() - 1 - i]))) << "written behind out";
    }
    return {out.begin() + kGuard, out.end() - kGuard};
  }
};

// Equal bits; any NaN equals any NaN.
void expect_same(const std::vector<BFloat16>& out, const std::vector<BFloat16>& expected, int64_t columns) {
  ASSERT_EQ(out.size(), expected.size());
  for (size_t i = 0; i < out.size(); ++i) {
    const float value = static_cast<float>(out[i]), want = static_cast<float>(expected[i]);
    if (std::isnan(value) && std::isnan(want)) continue;
    ASSERT_EQ(std::bit_cast<uint32_t>(value), std::bit_cast<uint32_t>(want))
        << "row " << i / columns << ", column " << i % columns << ": " << value << ", not " << want;
  }
}

void expect_products(const Problem& problem, unsigned blocks, uint64_t seed = 0) {
  expect_same(problem.run(blocks, seed), problem.expected(), problem.columns);
}

class GroupedGemmTile : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(PlainAndSwiglu, GroupedGemmTile, testing::Bool(),
                         [](const auto& parameter) { return parameter.param ? "Swiglu" : "Plain"; });

// Groups that are not whole tiles, an empty one, rows behind the last; edges of columns and of the depth. Tiles have 3
// steps and the ring 4 stages, and there are fewer blocks than tiles: tiles begin at every place in the ring.
TEST_P(GroupedGemmTile, ComputesRaggedGroupsUnderEverySchedule) {
  const Problem problem({70, 70, 220, 221}, 231, GetParam() ? 136 : 264, 136, GetParam());
  const std::vector<BFloat16> expected = problem.expected();
  for (uint64_t seed = 0; seed < 3; ++seed) expect_same(problem.run(1 + seed, seed), expected, problem.columns);
}

TEST_P(GroupedGemmTile, ComputesWholeTiles) {
  expect_products(Problem({128, 256}, 256, GetParam() ? 128 : 256, 128, GetParam()), 1);
}

TEST_P(GroupedGemmTile, ComputesTheSmallestProductUnderEverySchedule) {
  for (uint64_t seed = 0; seed < 8; ++seed) expect_products(Problem({1}, 1, 8, 8, GetParam()), 1, seed);
}

TEST_P(GroupedGemmTile, ManyExpertsWithFewRows) { expect_products(Problem({1, 1, 4, 4, 5}, 5, 24, 72, GetParam()), 2); }

TEST_P(GroupedGemmTile, RowsBehindTheLastGroupAreZero) {
  expect_products(Problem({0, 0}, 140, 264, 64, GetParam()), 2);
  expect_products(Problem({3, 3}, 140, 264, 64, GetParam()), 2);
}

TEST_P(GroupedGemmTile, UncheckedOffsetsStayWithinTheRows) {
  for (const std::vector<int64_t>& offs : {std::vector<int64_t>{7, 3}, {-5, 4, -1}, {INT32_MAX, 0}}) {
    expect_products(Problem(offs, 12, 16, 8, GetParam()), 2);
  }
}

TEST_P(GroupedGemmTile, TakesInt32Offsets) {
  const Problem problem({2, 5}, 6, 16, 8, GetParam());
  expect_same(problem.run(1, 0, /*int64_offs=*/false), problem.expected(), problem.columns);
}

// Tiles load rows of the next group and weights of other columns: none of them is seen.
TEST_P(GroupedGemmTile, NaNStaysInItsRowsAndColumns) {
  Problem problem({50, 50, 90}, 95, 136, 72, GetParam());
  const int64_t depth = problem.depth;
  std::fill_n(problem.a.begin() + 50 * depth, 45 * depth, BFloat16(NAN));                        // all but group 0
  std::fill_n(problem.b.begin() + problem.b_columns() * depth, 2 * problem.b_columns() * depth,  // all but expert 0
              BFloat16(NAN));
  std::fill_n(problem.b.begin() + 135 * depth, depth, BFloat16(NAN));  // the last column of its tile
  const std::vector<BFloat16> out = problem.run(2, 5);
  expect_same(out, problem.expected(), problem.columns);
  EXPECT_FALSE(std::isnan(static_cast<float>(out[49 * problem.columns + 134])));
}

TEST(GroupedGemmHopper, TakesAlignedPlainWeights) {
  const Problem problem({4}, 4, 16, 8, false);
  std::vector<BFloat16> out(64);
  const GroupedGemm<BFloat16> good = problem.gemm(out.data());
  EXPECT_TRUE(takes_grouped_gemm_tile_hopper(good, false));
  EXPECT_TRUE(takes_grouped_gemm_tile_hopper(good, true));  // 8 columns of out
  const auto declines = [&](bool swiglu, const auto& change) {
    GroupedGemm<BFloat16> gemm = good;
    change(gemm);
    return !takes_grouped_gemm_tile_hopper(gemm, swiglu);
  };
  EXPECT_TRUE(declines(false, [](auto& gemm) { gemm.b.format = WeightFormat::kPacked; }));
  EXPECT_TRUE(declines(false, [](auto& gemm) { gemm.b.depth = 12; }));
  EXPECT_TRUE(declines(false, [](auto& gemm) { gemm.b.columns = 20; }));
  EXPECT_TRUE(declines(true, [](auto& gemm) { gemm.b.columns = 24; }));
  EXPECT_TRUE(declines(false, [](auto& gemm) { ++gemm.a; }));
  EXPECT_TRUE(declines(false, [](auto& gemm) { ++gemm.out; }));
  EXPECT_TRUE(declines(false, [](auto& gemm) { gemm.b.data = static_cast<const BFloat16*>(gemm.b.data) + 1; }));
  for (const int64_t size : {int64_t{0}, int64_t{1} << 31}) {
    EXPECT_TRUE(declines(false, [&](auto& gemm) { gemm.rows = size; })) << size;
    EXPECT_TRUE(declines(false, [&](auto& gemm) { gemm.b.experts = size; })) << size;
    EXPECT_TRUE(declines(false, [&](auto& gemm) { gemm.b.columns = size; })) << size;
    EXPECT_TRUE(declines(false, [&](auto& gemm) { gemm.b.depth = size; })) << size;
  }
  EXPECT_TRUE(declines(false, [](auto& gemm) {  // more tiles than an int counts
    gemm.rows = 1 << 29;
    gemm.b.columns = 1 << 17;
  }));
}

}  // namespace
}  // namespace mixtral::cuda
