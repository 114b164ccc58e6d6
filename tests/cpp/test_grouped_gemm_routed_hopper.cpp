// The kernel of the grouped GEMM of few rows for rows that name their experts, on the emulated GPU.
#include "ops/grouped_gemm/hopper/quantize_rows_hopper.cuh"
#include "stream_gemm_problem.h"

namespace mixtral::cuda {
namespace {

using Ids = std::vector<int64_t>;  // [rows, copies]

constexpr int64_t kExperts = 5;

// ids in memory, int64 or int32; behind them is none.
class IdMemory {
 public:
  IdMemory(size_t count, bool is_wide) : bytes_(count * (is_wide ? 8 : 4)), is_wide_(is_wide) {}
  IndexArray array() const { return {bytes_.data(), is_wide_}; }
  void write(const Ids& ids) {
    const std::vector<int32_t> narrow(ids.begin(), ids.end());
    std::memcpy(bytes_.data(), is_wide_ ? static_cast<const void*>(ids.data()) : narrow.data(), bytes_.size());
  }
  Ids read() const {
    Ids ids(bytes_.size() / (is_wide_ ? 8 : 4));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = array()[static_cast<int64_t>(i)];
    return ids;
  }

 private:
  GuardedBytes bytes_;
  bool is_wide_;
};

// The kernel before writes the rows of a as its last work, and ids too if they are not ready.
template <typename Weights, typename Shape, bool kSwiglu>
std::vector<float> run(const Problem& p, const Operands<Weights>& operands, const Ids& ids, bool ids_ready,
                       uint64_t seed) {
  const int64_t copies = static_cast<int64_t>(ids.size());
  std::vector<BFloat16> out((copies + 1) * p.columns, BFloat16(NAN));  // a row more, which nobody may write
  IdMemory memory(ids.size(), seed % 2 == 0);
  memory.write(ids_ready ? ids : Ids(ids.size(), kExperts - 1));
  StreamGemm gemm{out.data(), {}, p.experts, p.rows, p.columns, p.depth};
  gemm.routed = {memory.array(), copies / p.rows, ids_ready};
  const auto weights = operands.weights(p, Shape::kGroups * kStreamTileRows);
  const TokenMaps tokens = operands.tokens(p);
  auto* a = const_cast<uint8_t*>(tokens.boxes[0].data);
  const std::vector<uint8_t> rows(a, a + p.rows * p.depth * Weights::kTokenBytes);
  std::fill_n(a, rows.size(), uint8_t{0xFF});  // NaN
  bool previous_is_done = false;
  const uint64_t schedule = seed + 8 * ids.size();  // another one for every problem
  emulator::Launch launch{
      {1 + static_cast<unsigned>(seed % 3), 1, 1}, Shape::kThreads, sizeof(StreamShared<Weights, Shape>), schedule};
  launch.previous_kernel = [&] {
    std::copy(rows.begin(), rows.end(), a);
    memory.write(ids);
    previous_is_done = true;
  };
  launch.next_kernel = [&] { EXPECT_TRUE(ids_ready || previous_is_done) << "the kernel behind may read ids at once"; };
  emulator::launch(launch, [&] { grouped_gemm_stream_kernel<Weights, Shape, kSwiglu>(weights, tokens, gemm); });
  return {out.begin(), out.end()};
}

std::vector<float> expected_rows(const Problem& p, const Ids& ids) {
  std::vector<float> out((ids.size() + 1) * p.columns, NAN);
  const int64_t copies = static_cast<int64_t>(ids.size()) / p.rows;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < p.experts) p.compute_row(static_cast<int64_t>(i) / copies, ids[i], &out[i * p.columns]);
  }
  return out;
}

bool same(const std::vector<float>& left, const std::vector<float>& right) {
  return std::equal(left.begin(), left.end(), right.begin(), right.end(),
                    [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); });
}

Problem make_problem(int64_t rows, int64_t columns, int64_t depth, bool swiglu) {
  return {std::vector<int64_t>(kExperts), rows, columns, depth, swiglu};  // offs only counts the experts here
}

// A layer's first product if `swiglu`, behind the kernel that writes ids, else its second.
template <typename Shape, typename Weights = BFloat16Weights>
void expect_products(const Ids& ids, int64_t rows, int64_t columns, int64_t depth, bool swiglu, uint64_t seeds = 3) {
  Problem p = make_problem(rows, columns, depth, swiglu);
  const Operands<Weights> operands(p);
  const std::vector<float> expected = expected_rows(p, ids);
  for (uint64_t seed = 0; seed < seeds; ++seed) {
    const std::vector<float> out = swiglu ? run<Weights, Shape, true>(p, operands, ids, false, seed)
                                          : run<Weights, Shape, false>(p, operands, ids, true, seed);
    EXPECT_TRUE(same(out, expected)) << rows << " rows, " << ids.size() << " copies, depth " << depth << ", seed "
                                     << seed;
  }
}

Ids random_ids(int64_t tokens, int64_t top_k) {  // any of -1 to kExperts, the same one several times too
  std::mt19937 random(static_cast<unsigned>(tokens * 8 + top_k));
  Ids ids(tokens * top_k);
  for (auto& id : ids) id = static_cast<int64_t>(random() % (kExperts + 2)) - 1;
  return ids;
}

TEST(GroupedGemmRouted, FewestTokensOfAnyRouting) {
  for (const auto& [tokens, top_k] : {std::array{1, 1}, std::array{1, 2}, std::array{2, 4}, std::array{5, 2},
                                      std::array{8, 2}, std::array{2, 1}, std::array{4, 4}}) {
    const Ids ids = random_ids(tokens, top_k);
    expect_products<FewestRows>(ids, tokens, 40, 72, true);
    expect_products<FewestRows>(ids, tokens * top_k, 72, 136, false);
  }
}

TEST(GroupedGemmRouted, FewTokensOfAnyRouting) {
  for (const auto& [tokens, top_k] : {std::array{17, 2}, std::array{32, 2}, std::array{32, 1}, std::array{13, 4}}) {
    const Ids ids = random_ids(tokens, top_k);
    expect_products<FewRows>(ids, tokens, 40, 72, true, 2);
    expect_products<FewRows>(ids, tokens * top_k, 72, 72, false, 2);
  }
}

TEST(GroupedGemmRouted, MoreStepsThanStages) {
  expect_products<FewestRows>({2, 0}, 1, 40, 64 * 11 + 8, true);
  expect_products<FewestRows>({2, 0}, 2, 72, 64 * 21 + 8, false);
  expect_products<FewRows>(random_ids(9, 2), 18, 72, 64 * 7, false);
}

TEST(GroupedGemmRouted, OneExpertForAllAndAllForOneToken) {
  expect_products<FewRows>(Ids(64, 3), 32, 72, 72, true);
  expect_products<FewRows>(Ids(64, 3), 64, 72, 72, false);
  expect_products<FewestRows>({4, 2, 0, 3, 1}, 1, 72, 72, true);
  expect_products<FewestRows>({4, 2, 0, 3, 1}, 5, 72, 72, false);
  expect_products<FewestRows>({1, 1, 1, 4}, 2, 72, 72, true);  // a token names an expert twice
}

TEST(GroupedGemmRouted, IdsOutsideTheExpertsAreNobodys) {
  const int64_t top = INT32_MAX, bottom = INT32_MIN;
  expect_products<FewestRows>({-1, kExperts, top, bottom}, 2, 72, 72, true);
  expect_products<FewestRows>({-1, kExperts, top, bottom}, 4, 72, 72, false);
  expect_products<FewestRows>({-1, 2, top, 0, 2, bottom}, 3, 72, 72, true);
  expect_products<FewestRows>({-1, 2, top, 0, 2, bottom}, 6, 72, 72, false);
}

TEST(GroupedGemmRouted, WideIdsAreNotNarrowed) {
  Problem p = make_problem(2, 72, 72, false);
  const Operands<BFloat16Weights> operands(p);
  const Ids ids{(int64_t{1} << 32) + 1, 3};
  EXPECT_TRUE(same(run<BFloat16Weights, FewestRows, false>(p, operands, ids, true, 0), expected_rows(p, ids)));
}

TEST(GroupedGemmRouted, NanStaysInItsRowAndItsExpert) {
  Problem p = make_problem(5, 72, 136, false);
  const Operands<BFloat16Weights> operands(p);
  const Ids ids{0, 2, -1, 0, 2};
  std::vector<float> expected = expected_rows(p, ids);
  for (const int64_t row : {2, 3}) std::fill_n(p.a.begin() + row * p.depth, p.depth, BFloat16(NAN));
  std::fill_n(expected.begin() + 3 * p.columns, p.columns, NAN);
  std::fill_n(p.b.begin() + p.weight_rows * p.depth, p.weight_rows * p.depth, BFloat16(NAN));  // of expert 1
  for (uint64_t seed = 0; seed < 4; ++seed)
    EXPECT_TRUE(same(run<BFloat16Weights, FewestRows, false>(p, operands, ids, true, seed), expected));
}

TEST(GroupedGemmRouted, PackedWeightsOfAnyRouting) {
  for (const auto& [tokens, top_k] : {std::array{1, 2}, std::array{16, 2}}) {
    const Ids ids = random_ids(tokens, top_k);
    expect_products<Int4Rows, Int4Weights>(ids, tokens, 64, 96, true);
    expect_products<Int4Rows, Int4Weights>(ids, tokens * top_k, 96, 64 * 9, false, 2);
  }
  for (const auto& [tokens, top_k] : {std::array{1, 2}, std::array{17, 2}}) {
    const Ids ids = random_ids(tokens, top_k);
    expect_products<FewRows, E4m3Weights>(ids, tokens, 64, 144, true);
    expect_products<FewRows, E4m3Weights>(ids, tokens * top_k, 96, 144, false, 2);
  }
}

// The kernels of a layer one after the other, each at the earliest moment: it finds ids as it was when the kernel in
// front let it start. When that one has ended, ids is complete.
class StartedLayer {
 public:
  StartedLayer(const Ids& ids, uint64_t seed) : ids_(ids), seed_(seed), memory_(ids.size(), true) {
    memory_.write(Ids(ids.size(), kExperts - 1));
  }
  template <typename Kernel>
  void run(int threads, size_t shared_bytes, const Kernel& kernel) {
    Ids at_next_start;
    emulator::Launch launch{{1, 1, 1}, static_cast<unsigned>(threads), shared_bytes, seed_++};
    launch.previous_kernel = [&] { memory_.write(ids_); };
    launch.next_kernel = [&] { at_next_start = memory_.read(); };
    emulator::launch(launch, kernel);
    memory_.write(at_next_start);
  }
  template <typename Weights, typename Shape>
  void multiply(Problem p, int64_t copies) {
    const Operands<Weights> operands(p);
    std::vector<BFloat16> out(ids_.size() * p.columns);
    StreamGemm gemm{out.data(), {}, p.experts, p.rows, p.columns, p.depth};
    gemm.routed = {memory_.array(), copies, false};
    const auto weights = operands.weights(p, Shape::kGroups * kStreamTileRows);
    const TokenMaps tokens = operands.tokens(p);
    run(Shape::kThreads, sizeof(StreamShared<Weights, Shape>),
        [&] { grouped_gemm_stream_kernel<Weights, Shape, true>(weights, tokens, gemm); });
  }
  void quantize() {
    const std::vector<BFloat16> a(16);
    std::vector<uint8_t> values(16);
    std::vector<float> scales(2);
    run(kE4m3Warps * kWarpSize, 0, [&] { quantize_rows_kernel(a.data(), {values.data(), scales.data()}, 2, 8); });
  }
  bool ids_are_complete() const { return memory_.read() == ids_; }

 private:
  const Ids ids_;
  uint64_t seed_;
  IdMemory memory_;
};

// The second product of a layer reads ids at its start (grouped_gemm_stream_routing_hopper.cuh).
TEST(GroupedGemmRouted, IdsAreCompleteWhenTheSecondProductMayStart) {
  const Ids ids{0, 2, 1, 0};
  for (uint64_t seed = 0; seed < 4; ++seed) {
    StartedLayer plain(ids, seed), int4(ids, seed), fp8(ids, seed);
    plain.multiply<BFloat16Weights, FewestRows>(make_problem(2, 32, 64, true), 2);
    EXPECT_TRUE(plain.ids_are_complete());
    int4.multiply<Int4Weights, Int4Rows>(make_problem(2, 32, 64, true), 2);
    EXPECT_TRUE(int4.ids_are_complete());
    fp8.quantize();
    EXPECT_FALSE(fp8.ids_are_complete());  // it lets the next kernel start at once
    fp8.multiply<E4m3Weights, FewRows>(make_problem(2, 32, 64, true), 2);
    fp8.quantize();
    EXPECT_TRUE(fp8.ids_are_complete());
  }
}

TEST(GroupedGemmRouted, EveryExpertWithACopyIsListedOnce) {
  for (const int64_t tokens : {1, 33, 64}) {
    const Ids ids = random_ids(tokens, 1);
    StreamGemm gemm{nullptr, {}, kExperts, tokens, 8, 64};
    gemm.routed.ids = {ids.data(), true};
    emulator::launch({{1, 1, 1}, kWarpSize, sizeof(StreamRouting), 0}, [&] {
      auto& routing = *reinterpret_cast<StreamRouting*>(dynamic_shared_memory());
      read_routing(routing, gemm);
      if (threadIdx.x > 0) return;
      const std::vector<int32_t> active(routing.active, routing.active + routing.active_count);
      for (int e = -1; e <= kExperts; ++e) {
        const bool has_copies = e >= 0 && e < kExperts && std::count(ids.begin(), ids.end(), e) > 0;
        EXPECT_EQ(std::count(active.begin(), active.end(), e), has_copies ? 1 : 0) << e;
      }
    });
  }
}

TEST(GroupedGemmRouted, LaunchesAreLargeEnoughForEveryRouting) {
  StreamGemm gemm{nullptr, {}, kExperts, 1, 200, 64};
  gemm.routed.ids.data = &gemm;
  gemm.routed.copies = 2;
  EXPECT_EQ(max_stream_units(gemm, 16, 64), 2 * 4);
  gemm.rows = 9;
  EXPECT_EQ(max_stream_units(gemm, 16, 64), kExperts * 4);
}

}  // namespace
}  // namespace mixtral::cuda
