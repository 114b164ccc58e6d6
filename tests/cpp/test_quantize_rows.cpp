// Rows of bf16 as e4m3 with a scale each, on the emulated GPU, against the CPU's and the definition of both: the least
// power of two with which the row's largest magnitude is at most 448, at least 2^-117, and each value over it rounded
// to nearest.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "gpu_emulator/hopper.h"
// The kernels, after the building blocks.
#include "ops/grouped_gemm/hopper/quantize_rows_hopper.cuh"
#include "ops/grouped_gemm/round_to_e4m3_kernels.cuh"

namespace mixtral::cuda {
namespace {

constexpr int64_t kDepth = 288;

float scale_of(const BFloat16* row) {
  float largest = 0, scale = 0x1p-117f;
  for (int64_t k = 0; k < kDepth; ++k) {
    if (!std::isfinite(static_cast<float>(row[k]))) return NAN;
    largest = std::fmax(largest, std::abs(static_cast<float>(row[k])));
  }
  while (largest / scale > 448) scale *= 2;
  return scale;
}

std::vector<BFloat16> rows_of_all_kinds() {  // [rows, kDepth]
  std::vector<BFloat16> rows;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const auto add = [&](float factor) {
    for (int64_t k = 0; k < kDepth; ++k) rows.push_back(normal(random) * factor);
    return rows.end() - kDepth;
  };
  for (const int exponent : {0, -8, 100, -109, -130}) add(std::ldexp(1.0f, exponent));
  add(0);
  for (const float largest : {448.0f, 450.0f, 1.75f, 1.7578125f, 3.389531389e38f}) *(add(largest / 8) + 5) = -largest;
  std::vector<BFloat16>::iterator ties = add(0);
  for (int i = 0; i < kDepth; ++i) ties[i] = i < 17 ? i * 0x1p-10f : i;  // halves of steps among them
  ties[0] = 448;
  *(add(1) + 7) = NAN;
  *(add(1) + 286) = -INFINITY;
  return rows;
}

TEST(QuantizeRows, RowsBecomeTheNearestE4m3UnderTheLeastScale) {
  const std::vector<BFloat16> a = rows_of_all_kinds();
  const int64_t rows = static_cast<int64_t>(a.size()) / kDepth;
  std::vector<uint8_t> values(a.size() + 1, 0xAB);
  std::vector<float> scales(rows + 1, -1.0f);
  const unsigned blocks = static_cast<unsigned>(rows) / kE4m3Warps + 1;
  emulator::launch({{blocks, 1, 1}, kE4m3Warps * kWarpSize, 0, 1}, [&] {
    quantize_rows_kernel(a.data(), {values.data(), scales.data()}, rows, kDepth);
  });
  std::vector<BFloat16> rounded(a.size() + 1, BFloat16(-1.0f));
  emulator::launch({{blocks, 1, 1}, kE4m3Warps * kWarpSize, 0, 1},
                   [&] { round_to_e4m3_kernel(a.data(), rounded.data(), rows, kDepth); });
  std::vector<BFloat16> on_cpu(a.size());
  launch_round_to_e4m3_cpu(a.data(), kDepth, on_cpu.data(), 0, rows);
  for (int64_t row = 0; row < rows; ++row) {
    const float scale = scale_of(&a[row * kDepth]);
    if (std::isnan(scale)) {
      EXPECT_TRUE(std::isnan(scales[row])) << row;
    } else {
      EXPECT_EQ(scales[row], scale) << row;
    }
    for (int64_t i = row * kDepth; i < (row + 1) * kDepth; ++i) {
      if (std::isnan(scale)) {
        ASSERT_TRUE(std::isnan(static_cast<float>(rounded[i])) && std::isnan(static_cast<float>(on_cpu[i]))) << row;
        continue;
      }
      const uint8_t nearest = e4m3_bits(static_cast<float>(a[i]) / scale);
      ASSERT_EQ(values[i], nearest) << row << ", " << static_cast<float>(a[i]);
      ASSERT_EQ(static_cast<float>(rounded[i]), static_cast<float>(on_cpu[i])) << row;
      ASSERT_EQ(static_cast<float>(rounded[i]), e4m3_value(nearest) * scale) << row << ", " << static_cast<float>(a[i]);
    }
  }
  EXPECT_EQ(values.back(), 0xAB);
  EXPECT_EQ(scales.back(), -1.0f);
  EXPECT_EQ(static_cast<float>(rounded.back()), -1.0f);
}

}  // namespace
}  // namespace mixtral::cuda
