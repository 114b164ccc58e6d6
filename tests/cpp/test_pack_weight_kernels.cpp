// unpack_weight's CUDA kernel, on the emulated GPU, gives the bits of the CPU's for weights that the CPU has packed.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "gpu_emulator/hopper.h"
// The kernel, after the building blocks.
#include "ops/pack_weight/pack_weight_kernels.cuh"

namespace mixtral::cuda {
namespace {

// Blocks of random rows, packed; `Out` is what they unpack to.
template <typename T, WeightFormat kFormat, typename Out = T>
void expect_bits_of_the_cpu(int64_t blocks, int64_t depth) {
  std::mt19937 random(static_cast<unsigned>(depth));
  std::normal_distribution<float> normal;
  std::vector<T> weight(blocks * kBlockRows * depth);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = T(normal(random) * std::ldexp(1.0f, static_cast<int>(i % 9)));
  std::vector<char> packed(blocks * packed_block_bytes(kFormat, depth, sizeof(T)));
  ASSERT_TRUE(launch_pack_weight_cpu(weight.data(), nullptr, kFormat, depth, packed.data(), 0, blocks));

  constexpr int64_t kGuard = 64;
  std::vector<Out> expected(weight.size() + kGuard, Out(NAN));
  launch_unpack_weight_cpu(packed.data(), kFormat, depth, expected.data(), 0, blocks);
  std::vector<Out> out(weight.size() + kGuard, Out(NAN));
  const int64_t threads = static_cast<int64_t>(weight.size()) / kUnpackValues;
  const unsigned grid = static_cast<unsigned>((threads + kUnpackThreads - 1) / kUnpackThreads);
  emulator::launch({{grid, 1, 1}, kUnpackThreads, 0, 0},
                   [&] { unpack_weight_kernel<Out, kFormat>(packed.data(), out.data(), blocks, depth); });
  EXPECT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(Out)), 0)
      << blocks << " blocks, depth " << depth;
}

TEST(UnpackWeightKernel, GivesTheBitsOfTheCpu) {
  for (const auto& [blocks, depth] : {std::pair{1, 32}, std::pair{3, 160}, std::pair{2, 1056}}) {
    expect_bits_of_the_cpu<float, WeightFormat::kPacked>(blocks, depth);
    expect_bits_of_the_cpu<BFloat16, WeightFormat::kPacked>(blocks, depth);
    expect_bits_of_the_cpu<Half, WeightFormat::kPacked>(blocks, depth);
    expect_bits_of_the_cpu<float, WeightFormat::kInt8, BFloat16>(blocks, depth);
    expect_bits_of_the_cpu<float, WeightFormat::kFp8, BFloat16>(blocks, depth);
    expect_bits_of_the_cpu<float, WeightFormat::kFp8, BFloat16>(blocks, depth);
    expect_bits_of_the_cpu<float, WeightFormat::kInt4, BFloat16>(blocks, depth);
  }
}

}  // namespace
}  // namespace mixtral::cuda
