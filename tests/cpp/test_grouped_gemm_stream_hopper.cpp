// The kernel of the grouped GEMM of few rows, on the emulated GPU: every row gets the products of its expert and no
// other, whatever the routing, the shape and the schedule.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "gpu_emulator/hopper.h"
#include "ops/grouped_gemm/grouped_gemm_stream_hopper.cuh"

namespace mixtral::cuda {
namespace {

constexpr float kNan = NAN;

struct Problem {
  std::vector<int64_t> offs;  // empty: a dense layer
  int64_t rows, columns, depth;
  bool swiglu = false;
  int64_t experts = std::max<int64_t>(1, static_cast<int64_t>(offs.size()));
  int64_t weight_rows = columns * (swiglu ? 2 : 1);
  std::vector<BFloat16> a = std::vector<BFloat16>(rows * depth);                   // [rows, depth]
  std::vector<BFloat16> b = std::vector<BFloat16>(experts * weight_rows * depth);  // [experts, weight_rows, depth]

  // Multiples of 1/64, few enough that the sums are exact in any order; they do need rounding to bf16.
  void fill() {
    std::mt19937 random(static_cast<unsigned>(rows + columns + depth));
    for (auto& x : a) x = random() % 3 ? 0.0f : static_cast<float>(static_cast<int>(random() % 5) - 2);
    for (auto& x : b) x = static_cast<float>(static_cast<int>(random() % 255) - 127) / 64;
  }

  int64_t expert_of(int64_t row) const {
    if (offs.empty()) return 0;
    int64_t end = 0;
    for (int64_t e = 0; e < experts; ++e) {
      end = std::min(std::max(offs[e], end), rows);
      if (row < end) return e;
    }
    return experts;
  }

  float product(int64_t row, int64_t expert, int64_t weight_row) const {
    float sum = 0;
    for (int64_t k = 0; k < depth; ++k) {
      sum += static_cast<float>(a[row * depth + k]) *
             static_cast<float>(b[(expert * weight_rows + weight_row) * depth + k]);
    }
    return sum;
  }

  std::vector<float> expected() const {  // [rows, columns]
    std::vector<float> out(rows * columns);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t expert = expert_of(row);
      if (expert == experts) continue;
      for (int64_t c = 0; c < columns; ++c) {
        float value = product(row, expert, c);
        if (swiglu) {
          const float g = BFloat16(value), u = BFloat16(product(row, expert, columns + c));
          value = g / (1.0f + expf(-g)) * u;
        }
        out[row * columns + c] = BFloat16(value);
      }
    }
    return out;
  }
};

template <typename Shape, bool kSwiglu>
void launch(const Problem& p, const StreamGemm& gemm, unsigned blocks, uint64_t seed) {
  TensorMap weights;
  TokenMaps tokens;
  const StreamWeightBoxes boxes = stream_weight_boxes(gemm, kSwiglu, Shape::kGroups * kStreamTileRows, kStreamDepth);
  ASSERT_TRUE(encode_tensor_map<4>(&weights, p.b.data(), MapElement::kBFloat16, boxes.sizes, boxes.strides, boxes.box));
  for (int box = 0; box < kTokenBoxes; ++box)
    ASSERT_TRUE(encode_tensor_map<2>(&tokens.boxes[box], p.a.data(), MapElement::kBFloat16, {p.depth, p.rows},
                                     {p.depth * 2}, {kStreamDepth, 8 << box}));
  emulator::launch({{blocks, 1, 1}, Shape::kThreads, sizeof(StreamShared<Shape>), seed},
                   [&] { grouped_gemm_stream_kernel<Shape, kSwiglu>(weights, tokens, gemm); });
}

// out as floats; fails where the kernel wrote beyond it.
template <typename Shape>
std::vector<float> run(const Problem& p, bool int64_offs, unsigned blocks, uint64_t seed) {
  constexpr int64_t kGuard = 1024;
  std::vector<BFloat16> out(p.rows * p.columns + kGuard, BFloat16(kNan));
  const std::vector<int32_t> narrow(p.offs.begin(), p.offs.end());
  const void* offs = int64_offs ? static_cast<const void*>(p.offs.data()) : narrow.data();
  const StreamGemm gemm{out.data(), {p.offs.empty() ? nullptr : offs, int64_offs}, p.experts, p.rows, p.columns,
                        p.depth};
  p.swiglu ? launch<Shape, true>(p, gemm, blocks, seed) : launch<Shape, false>(p, gemm, blocks, seed);
  for (int64_t i = p.rows * p.columns; i < static_cast<int64_t>(out.size()); ++i)
    EXPECT_TRUE(std::isnan(static_cast<float>(out[i]))) << i;
  return {out.begin(), out.end() - kGuard};
}

template <typename Shape>
void expect_products(Problem p, uint64_t seeds = 3) {
  p.fill();
  const std::vector<float> expected = p.expected();
  for (uint64_t seed = 0; seed < seeds; ++seed) {
    const unsigned blocks = 1 + seed % 3;
    EXPECT_EQ(run<Shape>(p, seed % 2 == 0, blocks, seed), expected)
        << p.rows << " rows, " << p.columns << " columns, depth " << p.depth << ", seed " << seed;
  }
}

TEST(GroupedGemmStream, FewRowsOfAnyRouting) {
  expect_products<FewRows>({{1}, 1, 64, 64});
  expect_products<FewRows>({{0, 2, 2, 11, 40, 40}, 40, 136, 72});  // groups of 0, 2, 9, 29 rows
  expect_products<FewRows>({{64, 64}, 64, 72, 136});               // one group of the most rows
  expect_products<FewRows>({{3, 4, 5}, 5, 8, 64 * 7 + 8});         // more steps than stages, one narrow unit
}

TEST(GroupedGemmStream, MoreRowsOfAnyRouting) {
  expect_products<MoreRows>({{0, 70, 75}, 75, 200, 72}, 2);        // 128 tokens, and 8
  expect_products<MoreRows>({{300, 309}, 309, 136, 72}, 2);        // two passes: 256 and 44 tokens
  expect_products<MoreRows>({{20, 20, 52}, 52, 128, 64 * 5 + 8});  // more steps than stages
}

TEST(GroupedGemmStream, SwigluIsThatOfTheRoundedProduct) {
  expect_products<FewRows>({{0, 9, 10, 50}, 50, 40, 136, true});  // 16, 8, 64 tokens; 32 and 8 columns
  expect_products<FewRows>({{20}, 20, 32, 72, true});
  expect_products<MoreRows>({{70, 70, 79}, 79, 104, 72, true}, 2);  // 64 and 40 columns
  expect_products<MoreRows>({{0, 130}, 130, 8, 64, true}, 2);
}

TEST(GroupedGemmStream, DenseLayersHaveNoOffsets) {
  expect_products<FewRows>({{}, 5, 264, 64 * 7 + 8});
  expect_products<FewRows>({{}, 33, 8, 8});
  expect_products<MoreRows>({{}, 260, 136, 72}, 2);
}

TEST(GroupedGemmStream, RowsBehindTheLastGroupAreZero) {
  expect_products<FewRows>({{2, 7}, 30, 72, 64});
  expect_products<FewRows>({{0, 0}, 9, 40, 64, true});
  expect_products<MoreRows>({{2, 7}, 300, 136, 64}, 2);
}

TEST(GroupedGemmStream, UncheckedOffsetsStayWithinTheRows) {
  for (const std::vector<int64_t>& offs :
       {std::vector<int64_t>{7, 3, 12}, {-5, 4, -1}, {INT32_MAX, 0, 3}, {INT32_MIN, INT32_MAX, 1}})
    expect_products<FewRows>({offs, 12, 72, 64}, 2);
}

TEST(GroupedGemmStream, NanStaysInItsRowAndItsExpert) {
  Problem p{{10, 10, 20, 24}, 26, 72, 136};
  p.fill();
  std::vector<float> expected = p.expected();
  for (const int64_t row : {9, 21, 25}) {  // the last of a group, one within, and one behind the last group
    std::fill_n(p.a.begin() + row * p.depth, p.depth, BFloat16(kNan));
    if (row < 24) std::fill_n(expected.begin() + row * p.columns, p.columns, kNan);
  }
  std::fill_n(p.b.begin() + p.weight_rows * p.depth, p.weight_rows * p.depth, BFloat16(kNan));  // has no rows
  for (uint64_t seed = 0; seed < 3; ++seed) {
    const std::vector<float> out = run<FewRows>(p, false, 2, seed);
    for (int64_t i = 0; i < p.rows * p.columns; ++i) {
      EXPECT_TRUE(out[i] == expected[i] || (std::isnan(out[i]) && std::isnan(expected[i]))) << i / p.columns;
    }
  }
}

TEST(GroupedGemmStream, DenseUnitsCoverEveryRowAndColumnOnce) {
  for (const int64_t rows : {1, 64, 65, 300}) {
    const StreamGemm gemm{nullptr, {nullptr, false}, 1, rows, 200, 64};
    std::vector<int> times(rows * 4);
    const int64_t units = max_stream_units(gemm, 64, 64);
    for (int64_t index = 0; index <= units; ++index) {
      const GemmTile unit = find_stream_unit(gemm, 64, 64, index);
      if (unit.expert < 0) continue;
      EXPECT_EQ(unit.expert, 0);
      for (int64_t r = unit.row_begin; r < unit.row_end; ++r) ++times[r * 4 + unit.column_block];
    }
    for (const int t : times) EXPECT_EQ(t, 1);
    EXPECT_LT(find_stream_unit(gemm, 64, 64, units).expert, 0);
  }
}

}  // namespace
}  // namespace mixtral::cuda
