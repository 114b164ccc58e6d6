// The kernels of a decode step that start while the kernel before them ends, on the emulated GPU: none reads what that
// kernel writes, or writes what it may still read, before it has ended, and none lets the next one start before.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>
#include <span>
#include <vector>

#include "gpu_emulator/hopper.h"
// The kernels, after the building blocks.
#include "ops/moe_permute/moe_permute_kernels.cuh"
#include "ops/moe_route/moe_route_kernels.cuh"
#include "ops/rms_norm/rms_norm_kernels.cuh"
#include "ops/rolling_kv_cache/rolling_kv_cache_kernels.cuh"
#include "ops/sliding_window_attention/hopper/attention_decode_hopper.cuh"

namespace mixtral::cuda {
namespace {

using Memory = std::span<unsigned char>;
using Contents = std::vector<unsigned char>;

template <typename T>
Memory memory_of(std::vector<T>& values) {
  return {reinterpret_cast<unsigned char*>(values.data()), values.size() * sizeof(T)};
}

std::vector<Contents> contents_of(const std::vector<Memory>& all) {
  std::vector<Contents> contents;
  for (const Memory& memory : all) contents.emplace_back(memory.begin(), memory.end());
  return contents;
}

void set_contents(const std::vector<Memory>& all, const std::vector<Contents>& contents) {
  for (size_t i = 0; i < all.size(); ++i) std::copy(contents[i].begin(), contents[i].end(), all[i].begin());
}

// Runs the kernel with all its inputs in place, then behind a kernel that writes them (NaN and -1 before) last of all.
void expect_starts_behind(emulator::Launch launch, const std::vector<Memory>& inputs,
                          const std::vector<Memory>& outputs, const std::function<void()>& kernel) {
  const auto written = contents_of(inputs), before = contents_of(outputs);
  emulator::launch(launch, kernel);
  const auto expected = contents_of(outputs);
  EXPECT_NE(expected, before);
  launch.waits_first = true;
  for (launch.seed = 0; launch.seed < 4; ++launch.seed) {
    set_contents(outputs, before);
    for (const Memory& memory : inputs) std::fill(memory.begin(), memory.end(), 0xFF);
    int ended = 0, started = 0;
    launch.previous_kernel = [&] {
      EXPECT_EQ(contents_of(outputs), before) << "written too early";
      set_contents(inputs, written);
      ++ended;
    };
    launch.next_kernel = [&] { ++started; };
    emulator::launch(launch, kernel);
    EXPECT_EQ(ended, 1);
    EXPECT_EQ(started, 1);
    EXPECT_EQ(contents_of(outputs), expected);
  }
}

template <typename T>
std::vector<T> numbers(int64_t size) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<T> values(size);
  for (T& x : values) x = normal(random);
  return values;
}

TEST(DependentLaunch, RmsNorm) {
  constexpr int64_t kRows = 2, kHidden = 520;
  auto x = numbers<BFloat16>(kRows * kHidden), residual = numbers<BFloat16>(kRows * kHidden);
  auto weight = numbers<BFloat16>(kHidden);
  std::vector<BFloat16> out(x.size()), sum(x.size());
  for (const BFloat16* added : {static_cast<const BFloat16*>(residual.data()), static_cast<const BFloat16*>(nullptr)}) {
    expect_starts_behind({{kRows, 1, 1}, kNormThreads}, {memory_of(x), memory_of(residual), memory_of(weight)},
                         {memory_of(out), memory_of(sum)}, [&] {
                           rms_norm_row_kernel<BFloat16, 8>(x.data(), added, weight.data(), out.data(), sum.data(),
                                                            kHidden, 1e-5f);
                         });
  }
}

TEST(DependentLaunch, MoeRoute) {
  constexpr int64_t kTokens = 5, kHidden = 40;
  constexpr int kExperts = 8, kTopK = 2;
  auto x = numbers<BFloat16>(kTokens * kHidden);
  auto router = numbers<float>(kExperts * kHidden), bias = numbers<float>(kExperts);
  std::vector<float> weights(kTokens * kTopK);
  std::vector<int32_t> ids(kTokens * kTopK, -7);
  expect_starts_behind({{2, 1, 1}, kRouteThreads, static_cast<size_t>(route_shared_bytes(4, kExperts))},
                       {memory_of(x), memory_of(router), memory_of(bias)}, {memory_of(weights), memory_of(ids)}, [&] {
                         moe_route_kernel<BFloat16, float, 4, 4>(x.data(), router.data(), bias.data(),
                                                                 {nullptr, weights.data(), ids.data()}, kTokens,
                                                                 kHidden, kExperts, kTopK, true);
                       });
}

TEST(DependentLaunch, MoePermute) {
  constexpr int64_t kCopies = 6, kTopK = 2, kHidden = 40, kExperts = 3;
  auto x = numbers<float>(kCopies / kTopK * kHidden);
  std::vector<int32_t> ids{0, 2, 1, 0, 2, 1}, offs(kExperts), row_map(kCopies);
  std::vector<float> permuted(kCopies * kHidden);
  expect_starts_behind({{3, 1, 1}, kPermuteThreads, static_cast<size_t>(permute_shared_bytes(kExperts))},
                       {memory_of(x), memory_of(ids)}, {memory_of(permuted), memory_of(offs), memory_of(row_map)}, [&] {
                         moe_permute_chunk_kernel<float>(x.data(), {ids.data(), false}, permuted.data(), offs.data(),
                                                         row_map.data(), kCopies, kTopK, kExperts, 2, kHidden);
                       });
}

TEST(DependentLaunch, MoeUnpermute) {
  constexpr int64_t kTokens = 3, kTopK = 2, kHidden = 264;
  auto y = numbers<BFloat16>(kTokens * kTopK * kHidden);
  auto weights = numbers<float>(kTokens * kTopK);
  std::vector<int64_t> row_map{3, 1, -1, 5, 0, 2};
  std::vector<BFloat16> out(kTokens * kHidden);
  expect_starts_behind({{kTokens, 1, 1}, kPermuteThreads}, {memory_of(y), memory_of(weights), memory_of(row_map)},
                       {memory_of(out)}, [&] {
                         moe_unpermute_token_kernel<BFloat16, 8>(y.data(), weights.data(),
                                                                 {{row_map.data(), true}, kTokens * kTopK, false},
                                                                 out.data(), kTopK, kHidden);
                       });
}

TEST(DependentLaunch, RollingKvCacheWrite) {
  constexpr int64_t kTokens = 3, kSlots = 5, kRow = 300;
  auto k = numbers<BFloat16>(kTokens * kRow), v = numbers<BFloat16>(kTokens * kRow);
  std::vector<int64_t> slots{4, 0, 2};
  std::vector<BFloat16> k_cache(kSlots * kRow), v_cache(kSlots * kRow);
  expect_starts_behind({{kTokens, 1, 1}, kCacheWriteThreads}, {memory_of(k), memory_of(v), memory_of(slots)},
                       {memory_of(k_cache), memory_of(v_cache)}, [&] {
                         rolling_kv_cache_write_row_kernel(k.data(), v.data(), k_cache.data(), v_cache.data(),
                                                           slots.data(), kSlots, kRow);
                       });
}

TEST(DependentLaunch, RollingKvCacheRopeWrite) {
  constexpr int64_t kTokens = 3, kHeads = 4, kKvHeads = 2, kPairs = 32, kSlots = 5, kRow = kKvHeads * 2 * kPairs;
  auto q = numbers<BFloat16>(kTokens * kHeads * 2 * kPairs);
  auto k = numbers<BFloat16>(kTokens * kRow), v = numbers<BFloat16>(kTokens * kRow);
  std::vector<int64_t> positions{7, 100, 0}, slots{4, 0, 2};
  std::vector<BFloat16> out(q.size()), k_cache(kSlots * kRow), v_cache(kSlots * kRow);
  const std::vector<float> frequencies(kPairs, 0.3f);
  const RopeWrite<BFloat16> write{{q.data(), kHeads * 2 * kPairs, out.data(), kHeads},
                                  {k.data(), kRow, k_cache.data(), kKvHeads},
                                  v.data(),
                                  kRow,
                                  v_cache.data(),
                                  positions.data(),
                                  slots.data()};
  expect_starts_behind({{kTokens, 1, 1}, kCacheRopeThreads},
                       {memory_of(q), memory_of(k), memory_of(v), memory_of(positions), memory_of(slots)},
                       {memory_of(out), memory_of(k_cache), memory_of(v_cache)}, [&] {
                         rolling_kv_cache_rope_write_token_kernel<BFloat16>(
                             write, InverseFrequencies(frequencies.data(), kPairs), kSlots, kPairs);
                       });
}

TEST(DependentLaunch, AttentionDecode) {
  constexpr int64_t kHeads = 4, kDim = 64, kPageSize = 16, kPages = 20;
  auto q = numbers<BFloat16>(kHeads * kDim);
  auto k = numbers<BFloat16>(kPages * kPageSize * kDim), v = numbers<BFloat16>(kPages * kPageSize * kDim);
  std::vector<int64_t> starts{0, 1}, lengths{300}, page_table(kPages);
  for (int64_t i = 0; i < kPages; ++i) page_table[i] = kPages - 1 - i;
  std::vector<BFloat16> out(q.size());
  DecodeProblem p{};
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.out = out.data();
  p.cu_seqlens_q = starts.data();
  p.keys = {nullptr, lengths.data(), page_table.data(), kPages, kPageSize, kPages};
  p.tokens = p.sequences = p.num_kv_heads = 1;
  p.num_heads = kHeads;
  p.head_dim = kDim;
  p.causal = true;
  p.scale = 0.25f;
  const DecodePlan plan = decode_plan(p);
  ASSERT_EQ(plan.splits, 2);
  std::vector<float> memory(decode_workspace_bytes(p, plan) / sizeof(float));
  const DecodeWorkspace workspace = decode_workspace(p, plan, memory.data());
  expect_starts_behind(
      {{static_cast<unsigned>(plan.tiles), 1, 2}, kDecodeThreads, sizeof(DecodeShared<kDim>)},
      {memory_of(q), memory_of(k), memory_of(v), memory_of(starts), memory_of(lengths), memory_of(page_table)},
      {memory_of(out), memory_of(memory)}, [&] { attention_decode_kernel<kDim>(p, plan, workspace); });
}

}  // namespace
}  // namespace mixtral::cuda
