// The emulated GPU keeps the rules of the real one: what breaks them is found, what keeps them computes the product.
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "gpu_emulator/wgmma.h"

namespace mixtral::cuda {
namespace {

constexpr int kStages = 3, kTile = 64, kTileBytes = kTile * 128;

struct Shared {
  unsigned char a[kStages][kTileBytes], b[kStages][kTileBytes];
  Barrier full[kStages], empty[kStages];
};

struct Fault {
  bool no_wait_full = false, no_wait_empty = false, release_early = false, no_release = false;
};

// out [64, 64] = a [64, depth] b [64, depth]^T: a warp fills a ring, a warpgroup multiplies.
void product_kernel(const TensorMap& a, const TensorMap& b, float* out, int steps, const Fault& fault) {
  auto* shared = reinterpret_cast<Shared*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(&shared->full[s], 1);
      init_barrier(&shared->empty[s], 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  RingPosition ring;
  if (threadIdx.x == 128) {
    for (int k = 0; k < steps; ++k, ring.advance(kStages)) {
      if (!fault.no_wait_empty) wait(&shared->empty[ring.stage], ring.parity ^ 1);
      arrive_expect_bytes(&shared->full[ring.stage], 2 * kTileBytes);
      load_box(shared->a[ring.stage], &a, &shared->full[ring.stage], k * 64, 0);
      load_box(shared->b[ring.stage], &b, &shared->full[ring.stage], k * 64, 0);
    }
  }
  if (threadIdx.x >= 128) return;
  float sums[kTile / 2];
  for (int k = 0; k < steps; ++k, ring.advance(kStages)) {
    if (!fault.no_wait_full) wait(&shared->full[ring.stage], ring.parity);
    const uint32_t left = shared_address(shared->a[ring.stage]), right = shared_address(shared->b[ring.stage]);
    fence_accumulators();
    for (int depth = 0; depth < 64; depth += 16) {
      multiply_bf16<kTile>(sums, matrix_descriptor(left + depth * 2), matrix_descriptor(right + depth * 2),
                           k + depth > 0);
    }
    commit_products();
    if (!fault.release_early) wait_products<0>();
    named_barrier_sync(1, 128);
    if (threadIdx.x == 0 && !fault.no_release) arrive(&shared->empty[ring.stage]);
  }
  wait_products<0>();
  for (int i = 0; i < kTile / 2; ++i) {
    const int thread = static_cast<int>(threadIdx.x);
    out[accumulator_row(thread, i) * kTile + accumulator_column(thread, i)] = sums[i];
  }
}

struct Problem {
  int steps = 7;
  std::vector<BFloat16> a, b;
  std::vector<float> expected;

  Problem() : a(64 * steps * 64), b(a.size()), expected(64 * 64) {
    std::mt19937 random(1);
    for (auto& x : a) x = static_cast<float>(static_cast<int>(random() % 9) - 4);  // sums are exact
    for (auto& x : b) x = static_cast<float>(static_cast<int>(random() % 9) - 4);
    const int depth = steps * 64;
    for (int r = 0; r < 64; ++r) {
      for (int c = 0; c < 64; ++c) {
        for (int k = 0; k < depth; ++k) {
          expected[r * 64 + c] += static_cast<float>(a[r * depth + k]) * static_cast<float>(b[c * depth + k]);
        }
      }
    }
  }

  std::vector<float> run(const Fault& fault, uint64_t seed) const {
    TensorMap left, right;
    const std::array<int64_t, 2> sizes{steps * 64, 64};
    EXPECT_TRUE(encode_tensor_map<2>(&left, a.data(), MapElement::kBFloat16, sizes, {steps * 128}, {64, 64}));
    EXPECT_TRUE(encode_tensor_map<2>(&right, b.data(), MapElement::kBFloat16, sizes, {steps * 128}, {64, 64}));
    std::vector<float> out(64 * 64, NAN);
    emulator::launch({{1, 1, 1}, 160, sizeof(Shared), seed},
                     [&] { product_kernel(left, right, out.data(), steps, fault); });
    return out;
  }
};

TEST(GpuEmulator, RingOfTmaAndWgmmaComputesTheProductUnderEverySchedule) {
  const Problem problem;
  for (uint64_t seed = 0; seed < 20; ++seed) EXPECT_EQ(problem.run({}, seed), problem.expected) << seed;
}

// What goes wrong under some schedule: a wrong product, or a message.
bool some_schedule_fails(const Fault& fault) {
  const Problem problem;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    try {
      if (problem.run(fault, seed) != problem.expected) return true;
    } catch (const std::runtime_error&) {
      return true;
    }
  }
  return false;
}

TEST(GpuEmulator, FindsMissingWaits) {
  EXPECT_TRUE(some_schedule_fails({.no_wait_full = true}));
  EXPECT_TRUE(some_schedule_fails({.no_wait_empty = true}));
  EXPECT_TRUE(some_schedule_fails({.release_early = true}));
}

TEST(GpuEmulator, FindsAnOperandThatIsOverwrittenBeforeItsProductIsWaitedFor) {
  const auto run = [](bool too_early) {
    emulator::launch({{1, 1, 1}, 128, 1024, 0}, [&] {
      uint32_t a[4] = {};
      float sums[4];
      fence_accumulators();
      multiply_bf16<8, false>(sums, a, matrix_descriptor(shared_address(dynamic_shared_memory())), false);
      commit_products();
      if (too_early) a[3] = 1;
      wait_products<0>();
      a[2] = 1;
    });
  };
  EXPECT_NO_THROW(run(false));
  EXPECT_THROW(run(true), std::runtime_error);
}

TEST(GpuEmulator, NamesADeadlock) {
  try {
    Problem().run({.no_release = true}, 0);
    FAIL() << "no deadlock";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("deadlock"), std::string::npos) << error.what();
  }
}

TEST(GpuEmulator, KernelsBeforeAndBehindOverlapAsFarAsTheyAreLet) {
  int previous = 0, next = 0, blocks = 0;
  emulator::Launch launch{{3, 1, 1}, 64, 0, 1};
  launch.previous_kernel = [&] { ++previous; };
  launch.next_kernel = [&] {
    EXPECT_EQ(blocks, 3);
    ++next;
  };
  emulator::launch(launch, [&] {
    EXPECT_EQ(next, 0);
    wait_for_previous_kernel();
    EXPECT_EQ(previous, 1);
    if (threadIdx.x == 0) ++blocks;
    __syncthreads();
    let_next_kernel_start();
  });
  EXPECT_EQ(next, 1);
}

TEST(GpuEmulator, MatrixFragmentsComeBackFromSharedMemory) {
  emulator::launch({{1, 1, 1}, 32, 1024, 3}, [] {
    auto* tile = reinterpret_cast<uint16_t*>(dynamic_shared_memory());  // [4][8][8]
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = 0; i < 8; ++i) tile[lane * 8 + i] = static_cast<uint16_t>(lane * 8 + i);
    __syncwarp();
    uint32_t registers[4];
    load_matrices(registers, tile + lane * 8);
    for (int m = 0; m < 4; ++m) {
      const uint32_t first = m * 64 + lane / 4 * 8 + lane % 4 * 2;
      emulator::require(registers[m] == (first | (first + 1) << 16), "ldmatrix");
    }
    __syncwarp();
    store_matrices_transposed(tile + 256 + lane * 8, registers);
    load_matrices_transposed(registers, tile + 256 + lane * 8);
    for (int m = 0; m < 4; ++m) {
      const uint32_t first = m * 64 + lane / 4 * 8 + lane % 4 * 2;
      emulator::require(registers[m] == (first | (first + 1) << 16), "stmatrix, ldmatrix transposed");
    }
  });
}

TEST(GpuEmulator, MmaOfOneWarpIsTheMatrixProduct) {
  emulator::launch({{1, 1, 1}, 32, 0, 0}, [] {
    const int lane = static_cast<int>(threadIdx.x);
    const auto a = [](int row, int k) { return static_cast<float>(row * 3 % 7 - k % 5); };
    const auto b = [](int column, int k) { return static_cast<float>(column % 3 + k * 5 % 11); };
    uint32_t left[4], right[2];
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r % 2 * 8, k = lane % 4 * 2 + r / 2 * 8;
      left[r] = pack_bf16(a(row, k), a(row, k + 1));
    }
    for (int r = 0; r < 2; ++r)
      right[r] = pack_bf16(b(lane / 4, lane % 4 * 2 + r * 8), b(lane / 4, lane % 4 * 2 + r * 8 + 1));
    float sum[4] = {1, 2, 3, 4};
    mma_bf16(sum, left, right[0], right[1]);
    for (int i = 0; i < 4; ++i) {
      float expected = static_cast<float>(i + 1);
      for (int k = 0; k < 16; ++k) expected += a(lane / 4 + i / 2 * 8, k) * b(lane % 4 * 2 + i % 2, k);
      emulator::require(sum[i] == expected, "mma");
    }
  });
}

}  // namespace
}  // namespace mixtral::cuda
