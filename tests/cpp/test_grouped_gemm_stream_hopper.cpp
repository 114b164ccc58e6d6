// The kernel of the grouped GEMM of few rows, on the emulated GPU: every row gets the products of its expert and no
// other, whatever the routing, the shape and the schedule.
#include "stream_gemm_problem.h"

namespace mixtral::cuda {
namespace {

constexpr float kNan = NAN;

// out as floats; fails where the kernel wrote beyond it. The kernel before writes offs as its last work.
template <typename Weights, typename Shape, bool kSwiglu>
std::vector<float> run(const Problem& p, const Operands<Weights>& operands, uint64_t seed, size_t early_copies = 0) {
  constexpr int64_t kGuard = 1024;
  std::vector<BFloat16> out(p.rows * p.columns + kGuard, BFloat16(kNan));
  std::vector<int32_t> narrow(p.offs.size(), 1);
  std::vector<int64_t> wide(p.offs.size(), 1);
  const bool is_wide = seed % 2 == 0;
  const void* offs = is_wide ? static_cast<const void*>(wide.data()) : narrow.data();
  const StreamGemm gemm{out.data(), {p.offs.empty() ? nullptr : offs, is_wide}, p.experts, p.rows, p.columns, p.depth};
  const auto weights = operands.weights(p, Shape::kGroups * kStreamTileRows);
  const TokenMaps tokens = operands.tokens(p);
  const unsigned blocks = 1 + seed % 3;
  emulator::Launch launch{{blocks, 1, 1}, Shape::kThreads, sizeof(StreamShared<Weights, Shape>), seed};
  launch.previous_kernel = [&] {
    std::copy(p.offs.begin(), p.offs.end(), narrow.begin());
    wide = p.offs;
  };
  launch.previous_may_end = [&] { return emulator::copies_begun() >= early_copies; };
  emulator::launch(launch, [&] { grouped_gemm_stream_kernel<Weights, Shape, kSwiglu>(weights, tokens, gemm); });
  for (int64_t i = p.rows * p.columns; i < static_cast<int64_t>(out.size()); ++i)
    EXPECT_TRUE(std::isnan(static_cast<float>(out[i]))) << i;
  return {out.begin(), out.end() - kGuard};
}

template <typename Weights, typename Shape>
std::vector<float> run(const Problem& p, const Operands<Weights>& operands, uint64_t seed) {
  return p.swiglu ? run<Weights, Shape, true>(p, operands, seed) : run<Weights, Shape, false>(p, operands, seed);
}

template <typename Shape, typename Weights = BFloat16Weights>
void expect_products(Problem p, uint64_t seeds = 3) {
  const Operands<Weights> operands(p);
  const std::vector<float> expected = p.expected();
  for (uint64_t seed = 0; seed < seeds; ++seed) {
    EXPECT_EQ((run<Weights, Shape>(p, operands, seed)), expected)
        << p.rows << " rows, " << p.columns << " columns, depth " << p.depth << ", seed " << seed;
  }
}

TEST(GroupedGemmStream, FewestRowsOfAnyRouting) {
  expect_products<FewestRows>({{0, 2, 2, 11, 16}, 16, 136, 72});
  expect_products<FewestRows>({{1, 2}, 2, 72, 64 * 11 + 8, true});  // more steps than stages
  expect_products<FewestRows>({{}, 1, 200, 64 * 11});
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

// The op swiglu divides approximately: where that shows after rounding, the kernel must do the same.
TEST(GroupedGemmStream, SwigluHasTheBitsOfTheOp) {
  Problem p{{1}, 1, 32, 8, true};
  p.a[0] = 1.0f;
  std::mt19937 random(1);
  for (int64_t c = 0; c < p.columns;) {
    const auto value = [&] { return BFloat16((static_cast<float>(random() % 4096) - 2048) / 512); };
    const BFloat16 gate = value(), up = value();
    const float g = gate, u = up, exact = BFloat16(g / (1.0f + expf(-g)) * u);
    if (static_cast<float>(swiglu_value(gate, up)) == exact) continue;
    p.b[c * p.depth] = gate;
    p.b[(p.columns + c++) * p.depth] = up;
  }
  const TensorMap weights = weight_map(p, p.b.data(), kStreamTileRows, WeightFormat::kPlain);
  const TokenMaps tokens = token_maps(p, p.a.data(), 2);
  std::vector<BFloat16> out(p.columns);
  const StreamGemm gemm{out.data(), {p.offs.data(), true}, 1, 1, p.columns, p.depth};
  emulator::launch({{1, 1, 1}, FewestRows::kThreads, sizeof(StreamShared<BFloat16Weights, FewestRows>)},
                   [&] { grouped_gemm_stream_kernel<BFloat16Weights, FewestRows, true>(weights, tokens, gemm); });
  EXPECT_EQ((std::vector<float>{out.begin(), out.end()}), p.expected());
}

TEST(GroupedGemmStream, DenseLayersHaveNoOffsets) {
  expect_products<FewRows>({{}, 5, 264, 64 * 7 + 8});
  expect_products<FewRows>({{}, 33, 8, 8});
  expect_products<MoreRows>({{}, 260, 136, 72}, 2);
}

// The kernel before ends when the ring is full of weights, and not earlier: who waits for it first waits for ever.
TEST(GroupedGemmStream, WeightsOfOneExpertAreLoadedBeforeTheWait) {
  for (const std::vector<int64_t>& offs : {std::vector<int64_t>{12}, {7}, {0}, {}}) {
    Problem p{offs, 12, 136, 64 * 7 + 8};  // a unit for each block
    const Operands<BFloat16Weights> operands(p);
    for (uint64_t seed = 0; seed < 3; ++seed)
      EXPECT_EQ((run<BFloat16Weights, FewRows, false>(p, operands, seed, FewRows::kStages)), p.expected());
  }
  Problem p{{30}, 33, 64, 64, true};  // two units of one step of two blocks
  const Operands<Int4Weights> operands(p);
  EXPECT_EQ((run<Int4Weights, Int4Rows, true>(p, operands, 0, 2)), p.expected());

  Problem several{{5, 12}, 12, 72, 64};
  const Operands<BFloat16Weights> weights(several);
  EXPECT_THROW((run<BFloat16Weights, FewRows, false>(several, weights, 0, 1)), std::runtime_error);
}

TEST(GroupedGemmStream, RowsBehindTheLastGroupAreZero) {
  expect_products<FewRows>({{2, 7}, 30, 72, 64});
  expect_products<FewRows>({{21}, 64, 72, 64});  // one group
  expect_products<MoreRows>({{70}, 300, 136, 64, true}, 2);
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
  const Operands<BFloat16Weights> operands(p);
  std::vector<float> expected = p.expected();
  for (const int64_t row : {9, 21, 25}) {  // the last of a group, one within, and one behind the last group
    std::fill_n(p.a.begin() + row * p.depth, p.depth, BFloat16(kNan));
    if (row < 24) std::fill_n(expected.begin() + row * p.columns, p.columns, kNan);
  }
  std::fill_n(p.b.begin() + p.weight_rows * p.depth, p.weight_rows * p.depth, BFloat16(kNan));  // has no rows
  for (uint64_t seed = 0; seed < 3; ++seed) {
    const std::vector<float> out = run<BFloat16Weights, FewRows>(p, operands, seed);
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

TEST(GroupedGemmStream, Int4WeightsAreThoseOfTheCpuFormat) {
  expect_products<Int4Rows, Int4Weights>({{0, 3, 3, 20, 52}, 52, 96, 96});  // a half tile of rows and of depths
  expect_products<Int4Rows, Int4Weights>({{2, 11}, 11, 32, 32});            // nothing but halves
  expect_products<Int4Rows, Int4Weights>({{40}, 45, 64, 64 * 9}, 2);        // two passes, more steps than stages
  expect_products<Int4Rows, Int4Weights>({{30}, 30, 160, 64 * 8 + 32}, 2);  // half tiles in a ring in full use
  expect_products<Int4Rows, Int4Weights>({{}, 5, 160, 64});
}

TEST(GroupedGemmStream, Int4SwigluTakesGateAndUpFromTheirBlocks) {
  expect_products<Int4Rows, Int4Weights>({{9, 10, 42}, 42, 96, 128, true});
  expect_products<Int4Rows, Int4Weights>({{0, 5, 5}, 7, 32, 96, true});
  expect_products<Int4Rows, Int4Weights>({{}, 33, 64, 32, true});
}

TEST(GroupedGemmStream, MoreRowsOfInt4) {
  expect_products<MoreInt4Rows, Int4Weights>({{0, 70, 75}, 80, 160, 96}, 2);   // 128 and 8 tokens, a unit and a bit
  expect_products<MoreInt4Rows, Int4Weights>({{300, 309}, 309, 96, 64}, 2);    // two passes: 256 and 44 tokens
  expect_products<MoreInt4Rows, Int4Weights>({{20, 20, 52}, 52, 32, 64 * 6});  // one half of the first tile
  expect_products<MoreInt4Rows, Int4Weights>({{17}, 20, 128, 64 * 8 + 32});    // more steps than stages, one group
  expect_products<MoreInt4Rows, Int4Weights>({{}, 40, 64, 32});                // half a step, one tile of two
}

TEST(GroupedGemmStream, SwigluOfMoreRowsOfInt4) {
  expect_products<MoreInt4Rows, Int4Weights>({{3, 133, 133}, 140, 96, 160, true}, 2);  // one unit and half of another
  expect_products<MoreInt4Rows, Int4Weights>({{0, 9, 270}, 270, 32, 64 * 3, true}, 2);
}

// The second half of every product takes away the first: what is left is the rounding of sums in their order. It is the
// same in every shape, and for the same weights unpacked.
TEST(GroupedGemmStream, Int4RowsHaveTheSameBitsInEveryShapeAndOfPlainWeights) {
  constexpr int64_t kHalf = 128, kHalfBytes = kHalf / 32 * kInt4StepBytes;
  Problem p{{40, 47, 120}, 120, 96, 2 * kHalf};
  const Operands<Int4Weights> operands(p);
  for (uint8_t* block = operands.packed.data(); block < operands.packed.data() + operands.packed.size();
       block += 2 * kHalfBytes)
    std::copy_n(block, kHalfBytes, block + kHalfBytes);
  for (auto b = p.b.begin(); b < p.b.end(); b += p.depth) std::copy_n(b, kHalf, b + kHalf);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < p.a.size(); ++i)
    p.a[i] = i / kHalf % 2 == 0 ? normal(random) : -static_cast<float>(p.a[i - kHalf]);

  const std::vector<float> few = run<Int4Weights, Int4Rows>(p, operands, 0);
  EXPECT_NE(few, p.expected());
  EXPECT_EQ((run<Int4Weights, MoreInt4Rows>(p, operands, 1)), few);
  Problem plain = p;
  const Operands<BFloat16Weights> unpacked(plain);
  plain.a = p.a;  // instead of numbers of its own
  plain.b = p.b;
  EXPECT_EQ((run<BFloat16Weights, MoreRows>(plain, unpacked, 2)), few);
}

TEST(GroupedGemmStream, Int4WeightsAreExactAtEveryScale) {
  for (int e = 0; e < 256; ++e) {
    std::vector<char> step(kInt4StepBytes, 0);
    step[0] = static_cast<char>(e);
    for (int d = 0; d < 16; ++d) step[int4_word_offset(0, d / 8) + d % 2 * 2 + d % 8 / 4] |= d << d % 8 / 2 % 2 * 4;
    for (int d = 0; d < 16; ++d) {
      const float expected = int4_weight(d, static_cast<uint8_t>(e));
      EXPECT_EQ(static_cast<float>(packed_value<BFloat16>(step.data(), WeightFormat::kInt4, 32, 0, d)), expected);
      const uint32_t pair = Int4Weights::make_pair(d << 1, int4_scale_bits(e) * 0x10001u);
      EXPECT_EQ(bf16_value(pair & 0xFFFF), expected) << d << " at scale " << e;
    }
  }
}

TEST(GroupedGemmStream, Fp8WeightsAreThoseOfTheCpuFormat) {
  expect_products<FewRows, E4m3Weights>({{0, 9, 10, 50}, 52, 96, 160});  // a half tile of rows, a part of a step
  expect_products<FewRows, E4m3Weights>({{2, 11}, 11, 32, 32});
  expect_products<FewRows, E4m3Weights>({{}, 5, 160, 128 * 7 + 32});  // more steps than stages
  expect_products<FewRows, E4m3Weights>({{7, 3, 12}, 12, 96, 64}, 2);
}

TEST(GroupedGemmStream, MoreRowsOfFp8) {
  expect_products<MoreE4m3Rows, E4m3Weights>({{0, 70, 75}, 80, 160, 96}, 2);       // 128 and 8 tokens, a unit and a bit
  expect_products<MoreE4m3Rows, E4m3Weights>({{140, 160}, 160, 32, 128 + 32}, 2);  // two passes: 128 and 12 tokens
  expect_products<MoreE4m3Rows, E4m3Weights>({{20, 20, 52}, 52, 128, 128 * 7 + 64});  // more steps than stages
}

TEST(GroupedGemmStream, Fp8SwigluTakesGateAndUpFromTheirBlocks) {
  expect_products<FewRows, E4m3Weights>({{9, 10, 42}, 42, 96, 128, true});
  expect_products<FewRows, E4m3Weights>({{0, 70}, 72, 32, 128 * 6 + 32, true}, 2);
  expect_products<FewRows, E4m3Weights>({{}, 33, 64, 32, true});
  expect_products<MoreE4m3Rows, E4m3Weights>({{3, 75, 75}, 79, 96, 160, true}, 2);  // one unit and half of another
}

// Sums that do round: every product of a row is added in the same order, whatever the shape and the neighbours.
TEST(GroupedGemmStream, Fp8RowsHaveTheSameBitsInEveryShape) {
  Problem p{{40, 47, 120}, 120, 96, 128 * 3 + 32};
  Operands<E4m3Weights> operands(p);
  for (uint8_t& byte : operands.a) byte = static_cast<uint8_t>(operands.random() % 0x7F + operands.random() % 2 * 0x80);
  const std::vector<float> few = run<E4m3Weights, FewRows>(p, operands, 0);
  EXPECT_EQ((run<E4m3Weights, MoreE4m3Rows>(p, operands, 1)), few);
  EXPECT_NE(few, p.expected());
}

TEST(GroupedGemmStream, Fp8RowOfScaleNanIsNanAlone) {
  Problem p{{5, 9}, 9, 64, 96};
  Operands<E4m3Weights> operands(p);
  std::vector<float> expected = p.expected();
  operands.a_scales[6] = kNan;
  const std::vector<float> out = run<E4m3Weights, FewRows>(p, operands, 0);
  for (int64_t i = 0; i < p.rows * p.columns; ++i)
    EXPECT_TRUE(i / p.columns == 6 ? std::isnan(out[i]) : out[i] == expected[i]) << i / p.columns;
}

}  // namespace
}  // namespace mixtral::cuda
