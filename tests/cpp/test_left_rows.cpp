// Copies of left operands, straight and transposed, row by row and in the order of AMX tiles.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "ops/cpu/buffer.h"
#include "ops/grouped_gemm/left_rows.h"

namespace mixtral::cpu {
namespace {

// Row r holds 1 + r * 7 + k at depth k, exact in every type that is tested.
template <bool kTiles, typename T, typename Operand>
void expect_copy(int64_t count, int64_t depth, bool transposed) {
  const int64_t stride = (transposed ? count : depth) + 3, padded = round_up(depth, kStepDepth);
  const int64_t out_rows = kTiles ? round_up(count, 32) : count;
  std::vector<T> source(stride * (transposed ? depth : count), T(-1.0f));
  const auto value = [](int64_t r, int64_t k) { return static_cast<float>((1 + r * 7 + k) % 251); };
  for (int64_t r = 0; r < count; ++r)
    for (int64_t k = 0; k < depth; ++k) source[transposed ? k * stride + r : r * stride + k] = T(value(r, k));
  Buffer<Operand> out(out_rows * padded);
  for (int64_t i = 0; i < out_rows * padded; ++i) *out.at(i) = Operand(-2.0f);
  copy_rows<kTiles>(LeftRows<T>{source.data(), stride, transposed}, count, depth, out.at(0));
  for (int64_t r = 0; r < out_rows; ++r)
    for (int64_t k = 0; k < padded; ++k) {
      const int64_t tile_place = ((r / 16 * (padded / 32) + k / 32) * 16 + r % 16) * 32 + k % 32;
      const float expected = r < count && k < depth ? value(r, k) : 0.0f;
      ASSERT_EQ(static_cast<float>(*out.at(kTiles ? tile_place : r * padded + k)), expected)
          << count << " rows, depth " << depth << ", row " << r << ", depth " << k;
    }
}

TEST(LeftRows, CopiesHoldEveryValueAndZerosAfterIt) {
  for (const int64_t count : {1, 16, 31, 32, 33, 70})
    for (const int64_t depth : {1, 16, 17, 32, 49, 256})
      for (const bool transposed : {false, true}) {
        expect_copy<false, float, float>(count, depth, transposed);
        expect_copy<false, Half, float>(count, depth, transposed);
        expect_copy<false, BFloat16, float>(count, depth, transposed);
        expect_copy<false, BFloat16, BFloat16>(count, depth, transposed);
        expect_copy<true, BFloat16, BFloat16>(count, depth, transposed);
      }
}

}  // namespace
}  // namespace mixtral::cpu
