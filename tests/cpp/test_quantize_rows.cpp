// Rows of bf16 as e4m3 with a scale each, on the emulated GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "gpu_emulator/hopper.h"
#include "ops/grouped_gemm/quantize_rows_hopper.cuh"

namespace mixtral::cuda {
namespace {

TEST(QuantizeRows, RowsBecomeE4m3WithTheirLargestAt448) {
  constexpr int64_t kRows = 7, kDepth = 264;
  std::vector<BFloat16> x(kRows * kDepth);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < kRows * kDepth; ++i) x[i] = normal(random) * std::ldexp(1.0f, static_cast<int>(i / kDepth));
  std::fill_n(x.begin() + 2 * kDepth, kDepth, BFloat16(0.0f));
  x[4 * kDepth + 5] = NAN;
  std::vector<uint8_t> out(x.size(), 0xFF);
  std::vector<float> scales(kRows, NAN);
  emulator::launch({{2, 1, 1}, kQuantizeWarps * kWarpSize, 0, 1},
                   [&] { quantize_rows_kernel(x.data(), out.data(), scales.data(), kRows, kDepth); });
  for (int64_t row = 0; row < kRows; ++row) {
    float largest = 0;
    for (int64_t k = 0; k < kDepth; ++k)
      largest = std::fmax(largest, std::abs(static_cast<float>(x[row * kDepth + k])));
    EXPECT_EQ(scales[row], std::fmax(largest, 1e-10f) / 448);
    for (int64_t k = 0; k < kDepth; ++k) {
      const float value = x[row * kDepth + k], error = e4m3_value(out[row * kDepth + k]) * scales[row] - value;
      // Four significant bits, and steps of 2^-9 among the smallest.
      EXPECT_TRUE(std::isnan(value) ? std::isnan(error)
                                    : std::abs(error) <= std::fmax(std::abs(value) / 15.9f, scales[row] / 1000))
          << row << ", " << k;
    }
  }
}

}  // namespace
}  // namespace mixtral::cuda
