// The formats of weights and tokens of the Hopper kernels: the same numbers as on the CPU, each in its place.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "gpu_emulator/hopper.h"
#include "int4_value.h"
#include "ops/grouped_gemm/quantize_rows_hopper.cuh"
#include "ops/pack_weight/dequantize.h"

namespace mixtral::cuda {
namespace {

std::vector<uint8_t> random_int4(int64_t rows, int64_t depth) {
  std::vector<uint8_t> packed(rows / 32 * (depth / 32) * kInt4StepBytes);
  std::mt19937 random(7);
  for (auto& byte : packed) byte = static_cast<uint8_t>(random());
  return packed;
}

TEST(StreamFormats, PackedInt4ValuesAreThoseThatTheCpuMultiplies) {
  const std::vector<uint8_t> packed = random_int4(32, 64);
  std::vector<BFloat16> steps(2 * 1024);  // in pair order
  dequantize_int4(reinterpret_cast<const char*>(packed.data()), 0, 2, steps.data());
  for (int64_t row = 0; row < 32; ++row)
    for (int64_t k = 0; k < 64; ++k) {
      const int64_t place = k / 32 * 1024 + (row / 16 * 16 + k % 32 / 2) * 32 + row % 16 * 2 + k % 2;
      EXPECT_EQ(static_cast<float>(steps[place]), int4_value(packed_int4_value(packed.data(), 64, row, k)))
          << row << ", " << k;
    }
}

TEST(StreamFormats, Int4LevelsAreExactAtEveryScale) {
  for (uint32_t e = 0; e < 256; ++e) {
    const uint32_t scales = int4_scales(e | (255 - e) << 16);
    for (uint32_t n = 0; n < 16; ++n) {
      const float level = static_cast<float>(n) - 7.5f;
      EXPECT_EQ(bf16_value(bf16_bits(level * bf16_value(scales & 0xFFFF))), int4_value({n, static_cast<uint8_t>(e)}));
      EXPECT_EQ(bf16_value(bf16_bits(level * bf16_value(scales >> 16))),
                int4_value({n, static_cast<uint8_t>(255 - e)}));
    }
  }
}

TEST(StreamFormats, Int4TilesHaveAPlaceForEveryNibble) {
  std::vector<uint32_t> words(kInt4NibbleBytes / 4);
  std::vector<int> scales(kInt4TileBytes);
  for (int row = 0; row < 64; ++row) {
    for (int depth = 0; depth < kInt4TileDepth; ++depth) {
      const Int4Place place = int4_place(row, depth);
      EXPECT_EQ(words.at(place.word) >> place.shift & 15, 0u);
      words[place.word] |= 15u << place.shift;
      ++scales.at(int4_scale_place(row, depth));
    }
  }
  for (const uint32_t word : words) EXPECT_EQ(word, 0xFFFFFFFFu);
  for (int i = 0; i < kInt4TileBytes; ++i) EXPECT_EQ(scales[i], i < kInt4NibbleBytes ? 0 : 32);
}

TEST(StreamFormats, Int4TilesAreZeroWhereTheWeightsEnd) {
  const std::vector<uint8_t> packed = random_int4(96, 32);  // one tile and a half of rows, half a tile of depths
  std::vector<uint8_t> tiles(2 * kInt4TileBytes, 0xFF);
  make_int4_tiles(packed.data(), 1, 96, 32, /*swiglu=*/false, tiles.data());
  for (int row = 0; row < 128; ++row)
    for (int k = 0; k < kInt4TileDepth; ++k) {
      const uint8_t* tile = tiles.data() + row / 64 * kInt4TileBytes;
      const Int4Place place = int4_place(row % 64, k);
      uint32_t word;
      std::memcpy(&word, tile + place.word * 4, sizeof word);
      const Int4Value expected = row < 96 && k < 32 ? packed_int4_value(packed.data(), 32, row, k) : Int4Value{0, 0};
      EXPECT_EQ(word >> place.shift & 15, expected.nibble);
      EXPECT_EQ(tile[int4_scale_place(row % 64, k)], expected.scale);
    }
}

TEST(StreamFormats, RowsBecomeE4m3WithTheirLargestAt448) {
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
