// Attention of few query tokens on the emulated GPU against attention in f64. Every slot of the cache that no query may
// see holds NaN, and so do output and workspace before a launch.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#include "gpu_emulator/hopper.h"
#include "ops/sliding_window_attention/hopper/attention_decode_hopper.cuh"

namespace mixtral {
namespace {

using torch::headeronly::BFloat16;

struct Config {
  std::vector<int64_t> queries, lengths;  // of every sequence
  int64_t window = 0, num_heads = 4, num_kv_heads = 1, head_dim = 64;
  int64_t page_size = 16;  // 0: packed keys
  bool causal = true;
};

class Batch {
 public:
  explicit Batch(const Config& config, bool zero_queries = false, unsigned seed = 1) : c(config), random_(seed) {
    for (size_t b = 0; b < c.queries.size(); ++b) {
      cu_q.push_back(cu_q.back() + c.queries[b]);
      cu_k.push_back(cu_k.back() + c.lengths[b]);
    }
    q = numbers(cu_q.back() * c.num_heads * c.head_dim);
    if (zero_queries) std::fill(q.begin(), q.end(), BFloat16(0.0f));
    k = numbers(cu_k.back() * row_size());
    v = numbers(cu_k.back() * row_size());
    if (c.page_size > 0) make_pages();
  }

  DecodeProblem problem() const {
    DecodeProblem p{};
    p.q = q.data();
    p.k = (c.page_size > 0 ? k_cache : k).data();
    p.v = (c.page_size > 0 ? v_cache : v).data();
    p.cu_seqlens_q = cu_q.data();
    p.keys.cu_seqlens = cu_k.data();
    p.keys.pages = 1;
    p.keys.page_size = static_cast<int64_t>(k.size()) / row_size();
    if (c.page_size > 0) p.keys = {nullptr, c.lengths.data(), page_table.data(), pages_, c.page_size, columns_};
    p.tokens = static_cast<int64_t>(q.size()) / (c.num_heads * c.head_dim);
    p.sequences = static_cast<int64_t>(c.queries.size());
    p.num_heads = c.num_heads;
    p.num_kv_heads = c.num_kv_heads;
    p.head_dim = c.head_dim;
    p.window = c.window;
    p.causal = c.causal;
    p.scale = 0.25f;
    return p;
  }

  // [T, Nq, D]; splits 0: as planned. counters: as the launch before left them.
  std::vector<BFloat16> run(int splits = 0, uint64_t seed = 0, std::vector<int>* counters = nullptr) const {
    DecodeProblem p = problem();
    std::vector<BFloat16> out(q.size(), BFloat16(NAN));
    p.out = out.data();
    EXPECT_TRUE(takes_attention_decode_hopper(p));
    DecodePlan plan = decode_plan(p);
    if (splits > 0) plan.splits = splits;
    std::vector<float> memory(decode_workspace_bytes(p, plan) / sizeof(float), NAN);
    DecodeWorkspace workspace = decode_workspace(p, plan, memory.data());
    std::vector<int> own(kMaxDecodeArrivals);
    if (!counters) counters = &own;
    workspace.arrivals = counters->data();
    const emulator::Index3 grid{static_cast<unsigned>(plan.tiles), static_cast<unsigned>(p.num_kv_heads),
                                static_cast<unsigned>(plan.splits)};
    if (c.head_dim == 64) {
      emulator::launch({grid, cuda::kDecodeThreads, sizeof(cuda::DecodeShared<64>), seed},
                       [&] { cuda::attention_decode_kernel<64>(p, plan, workspace); });
    } else {
      emulator::launch({grid, cuda::kDecodeThreads, sizeof(cuda::DecodeShared<128>), seed},
                       [&] { cuda::attention_decode_kernel<128>(p, plan, workspace); });
    }
    EXPECT_EQ(std::count(counters->begin(), counters->end(), 0), kMaxDecodeArrivals);
    return out;
  }

  // Calls check(index in out, expected value, sum of weights times magnitudes of values).
  template <typename Check>
  void reference(const Check& check) const {
    const DecodeProblem p = problem();
    for (int64_t b = 0; b < p.sequences; ++b) {
      for (int64_t t = cu_q[b]; t < cu_q[b + 1]; ++t) {
        for (int64_t h = 0; h < c.num_heads; ++h) reference_row(p, b, t, h, check);
      }
    }
  }

  int64_t row_size() const { return c.num_kv_heads * c.head_dim; }
  int64_t first_key(int64_t sequence) const { return cu_k[sequence]; }

  Config c;
  std::vector<BFloat16> q, k, v;           // [T, Nq, D], [keys, Nkv, D]
  std::vector<BFloat16> k_cache, v_cache;  // [pages, P, Nkv, D]
  std::vector<int64_t> page_table;         // [B, R]
  std::vector<int64_t> cu_q{0}, cu_k{0};   // [B + 1]

 private:
  std::vector<BFloat16> numbers(int64_t size) {
    std::vector<BFloat16> values(size);
    for (auto& x : values) x = static_cast<float>(static_cast<int>(random_() % 33) - 16) / 8;  // sums are exact
    return values;
  }

  // What the queries see is written, page by page in a random order; a column is used again when its page is behind.
  void make_pages() {
    const int64_t sequences = static_cast<int64_t>(c.queries.size());
    const int64_t chunk = *std::max_element(c.queries.begin(), c.queries.end());
    const int64_t longest = *std::max_element(c.lengths.begin(), c.lengths.end());
    columns_ = c.window > 0 ? (c.window - 1 + chunk + c.page_size - 1) / c.page_size + 1 : longest / c.page_size + 1;
    pages_ = sequences * columns_ + 3;
    std::vector<int64_t> free(pages_);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), random_);
    page_table.assign(sequences * columns_, -1);
    k_cache.assign(pages_ * c.page_size * row_size(), BFloat16(NAN));
    v_cache = k_cache;
    for (int64_t b = 0; b < sequences; ++b) {
      const int64_t oldest = c.lengths[b] - c.queries[b];
      for (int64_t key = visible_keys(oldest, c.lengths[b], c.window, c.causal).begin; key < c.lengths[b]; ++key) {
        int64_t& page = page_table[b * columns_ + key / c.page_size % columns_];
        if (page < 0) {
          page = free.back();
          free.pop_back();
        }
        const int64_t slot = (page * c.page_size + key % c.page_size) * row_size();
        std::copy_n(&k[(cu_k[b] + key) * row_size()], row_size(), &k_cache[slot]);
        std::copy_n(&v[(cu_k[b] + key) * row_size()], row_size(), &v_cache[slot]);
      }
    }
  }

  template <typename Check>
  void reference_row(const DecodeProblem& p, int64_t b, int64_t t, int64_t h, const Check& check) const {
    const int64_t position = t - cu_q[b + 1] + c.lengths[b], kv_head = h / (c.num_heads / c.num_kv_heads);
    const size_t query = (t * c.num_heads + h) * c.head_dim;
    std::vector<double> scores, sums(c.head_dim), magnitudes(c.head_dim);
    std::vector<size_t> rows;
    for (int64_t key = 0; key < c.lengths[b]; ++key) {
      if (c.causal && (key > position || (c.window > 0 && key <= position - c.window))) continue;
      rows.push_back((cu_k[b] + key) * row_size() + kv_head * c.head_dim);
      double score = 0;
      for (int64_t d = 0; d < c.head_dim; ++d)
        score += static_cast<double>(q[query + d]) * static_cast<double>(k[rows.back() + d]);
      scores.push_back(score * p.scale);
    }
    const double max = scores.empty() ? 0 : *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (size_t j = 0; j < rows.size(); ++j) {
      const double weight = std::exp(scores[j] - max);
      total += weight;
      for (int64_t d = 0; d < c.head_dim; ++d) {
        sums[d] += weight * static_cast<double>(v[rows[j] + d]);
        magnitudes[d] += weight * std::abs(static_cast<double>(v[rows[j] + d]));
      }
    }
    for (int64_t d = 0; d < c.head_dim; ++d)
      check(query + d, rows.empty() ? 0 : sums[d] / total, rows.empty() ? 0 : magnitudes[d] / total);
  }

  std::mt19937 random_;
  int64_t pages_ = 0, columns_ = 0;
};

// Weights and result are rounded to bf16 once each, all sums are of f32.
void expect_near_reference(const Batch& batch, const std::vector<BFloat16>& out) {
  int64_t wrong = 0;
  batch.reference([&](size_t i, double expected, double magnitude) {
    const double error = std::abs(static_cast<double>(out[i]) - expected);
    if (!(error <= (magnitude + std::abs(expected)) * 1.02 / 256 + 1e-6)) ++wrong;
  });
  EXPECT_EQ(wrong, 0);
}

// Queries of zeros: the result is the mean of the values seen, whose sums are exact. A key too few or too many shows.
void expect_exact_mean(const Batch& batch, const std::vector<BFloat16>& out) {
  int64_t wrong = 0;
  batch.reference([&](size_t i, double expected, double) {
    const BFloat16 low = static_cast<float>(expected * (1 - 1e-6)), high = static_cast<float>(expected * (1 + 1e-6));
    if (!(out[i] == low || out[i] == high)) ++wrong;
  });
  EXPECT_EQ(wrong, 0);
}

bool same_bits(const std::vector<BFloat16>& a, const std::vector<BFloat16>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(BFloat16)) == 0;
}

const std::vector<Config>& configs() {
  static const std::vector<Config> all = {
      {.queries = {1}, .lengths = {300}},
      {.queries = {1}, .lengths = {1}, .head_dim = 128},
      {.queries = {1, 1, 1, 1}, .lengths = {5, 64, 65, 130}, .num_kv_heads = 2, .head_dim = 128},
      {.queries = {1, 1}, .lengths = {517, 90}, .window = 100},
      {.queries = {1}, .lengths = {400}, .window = 257, .num_heads = 8, .page_size = 24},
      {.queries = {1, 1}, .lengths = {130, 40}, .num_heads = 2, .num_kv_heads = 2, .page_size = 1},
      {.queries = {5, 2, 0, 4}, .lengths = {70, 2, 90, 130}, .window = 30},
      {.queries = {16}, .lengths = {290}, .window = 230},
      {.queries = {8, 7}, .lengths = {330, 7}, .head_dim = 128},
      {.queries = {7}, .lengths = {100}, .num_heads = 3},
      {.queries = {0, 9, 0}, .lengths = {10, 80, 0}},
      {.queries = {3, 2, 4}, .lengths = {2, 0, 70}},
      {.queries = {1, 2}, .lengths = {130, 77}, .window = 50, .page_size = 0},
      {.queries = {2, 3}, .lengths = {70, 0}, .page_size = 0, .causal = false},
  };
  return all;
}

TEST(AttentionDecodeHopper, MatchesTheReference) {
  for (size_t i = 0; i < configs().size(); ++i) {
    SCOPED_TRACE(i);
    const Batch batch(configs()[i]);
    expect_near_reference(batch, batch.run(i % 2 == 0 ? 0 : 3, i));
  }
}

TEST(AttentionDecodeHopper, EveryVisibleKeyCountsOnce) {
  for (size_t i = 0; i < configs().size(); ++i) {
    SCOPED_TRACE(i);
    const Batch batch(configs()[i], true);
    expect_exact_mean(batch, batch.run(1, i));
    expect_exact_mean(batch, batch.run(2, i));
  }
}

TEST(AttentionDecodeHopper, AnyNumberOfSplitsGivesTheSameMean) {
  const Batch batch({.queries = {1, 1}, .lengths = {600, 70}, .window = 500}, true);
  const auto whole = batch.run(1);
  expect_exact_mean(batch, whole);
  for (int splits : {2, 3, 5, 16, 32}) EXPECT_TRUE(same_bits(batch.run(splits, splits), whole)) << splits;
}

// One buffer of counters, as a stream or a graph has it: batches of other shapes and with bad offsets come between.
TEST(AttentionDecodeHopper, EveryLaunchLeavesItsCountersClear) {
  const Batch batch({.queries = {2, 1}, .lengths = {400, 130}, .num_kv_heads = 2});
  const Batch other({.queries = {5, 0, 4}, .lengths = {300, 7, 130}, .head_dim = 128});
  Batch bad({.queries = {1, 1}, .lengths = {40, 30}, .page_size = 0});
  bad.cu_q[2] = 1000;
  std::vector<int> counters(kMaxDecodeArrivals);
  const auto first = batch.run(5, 0, &counters), second = other.run(3, 0, &counters);
  for (uint64_t seed = 1; seed < 5; ++seed) {
    EXPECT_TRUE(same_bits(batch.run(5, seed, &counters), first)) << seed;
    bad.run(2, seed, &counters);
    EXPECT_TRUE(same_bits(other.run(3, seed, &counters), second)) << seed;
  }
}

TEST(AttentionDecodeHopper, RepeatsItsBitsInAnyOrderOfBlocks) {
  const Batch batch({.queries = {2, 1}, .lengths = {400, 130}, .num_kv_heads = 2});
  const auto first = batch.run(5);
  for (uint64_t seed = 1; seed < 5; ++seed) EXPECT_TRUE(same_bits(batch.run(5, seed), first)) << seed;
}

TEST(AttentionDecodeHopper, AKeyOnAMissingPageIsZeros) {
  for (const int64_t missing : {int64_t{-1}, int64_t{1} << 40}) {
    Batch batch({.queries = {1}, .lengths = {100}});
    batch.page_table[2] = missing;
    std::fill_n(&batch.k[32 * batch.row_size()], 16 * batch.row_size(), BFloat16(0.0f));
    std::fill_n(&batch.v[32 * batch.row_size()], 16 * batch.row_size(), BFloat16(0.0f));
    expect_near_reference(batch, batch.run());
  }
}

// Nobody checks the offsets on the device.
TEST(AttentionDecodeHopper, OffsetsBehindTheTensorsAreNotFollowed) {
  const Config config{.queries = {1, 1}, .lengths = {40, 30}, .page_size = 0};
  const auto clean = Batch(config).run(2);
  const auto first_token = [](const std::vector<BFloat16>& out) {
    return std::vector<BFloat16>(out.begin(), out.begin() + 4 * 64);
  };
  for (const int64_t wrong : {int64_t{1000}, int64_t{1} << 40, int64_t{-1000}}) {
    Batch queries(config);
    queries.cu_q[2] = wrong;
    const auto out = queries.run(2);
    EXPECT_TRUE(same_bits(first_token(out), first_token(clean))) << wrong;
    for (size_t i = 4 * 64; i < out.size(); ++i) ASSERT_TRUE(std::isnan(static_cast<float>(out[i]))) << wrong;
  }
  Batch keys(config);
  keys.cu_k[1] = 1000;  // the end of the first sequence and the start of the second one
  for (const BFloat16 x : first_token(keys.run(2))) ASSERT_TRUE(std::isfinite(static_cast<float>(x)));
}

TEST(AttentionDecodeHopper, OneValueReachesOnlyTheQueriesThatSeeIt) {
  for (const int64_t window : {0, 5}) {
    const Config config{.queries = {6}, .lengths = {84}, .window = window, .num_heads = 2, .page_size = 0};
    const auto clean = Batch(config).run();
    for (const auto& [position, column, value] : {std::tuple{72, 7, NAN}, {79, 8, INFINITY}, {80, 62, NAN}}) {
      Batch batch(config);
      batch.v[position * 64 + column] = value;
      auto out = batch.run();
      for (int row = 0; row < 12; ++row) {
        const int at = 78 + row / 2;
        if (position > at || (window > 0 && position <= at - window)) continue;
        BFloat16& spoilt = out[row * 64 + column];
        EXPECT_FALSE(std::isfinite(static_cast<float>(spoilt)));
        spoilt = clean[row * 64 + column];
      }
      EXPECT_TRUE(same_bits(out, clean)) << value << " at " << position << ", window " << window;
    }
  }
}

TEST(AttentionDecodeHopper, ANaNQueryOrKeySpoilsNoOtherRow) {
  const Config config{.queries = {2, 1}, .lengths = {40, 30}, .page_size = 0};
  const auto clean = Batch(config).run(2);
  Batch batch(config);
  batch.q[0] = BFloat16(NAN);                               // token 0, head 0
  batch.k[(batch.first_key(1) + 29) * 64] = BFloat16(NAN);  // token 2
  const auto out = batch.run(2);
  for (size_t i = 0; i < out.size(); ++i) {
    const bool spoilt = i < 64 || i >= 2 * 4 * 64;
    EXPECT_EQ(std::isnan(static_cast<float>(out[i])), spoilt) << i;
    if (!spoilt) {
      EXPECT_EQ(static_cast<float>(out[i]), static_cast<float>(clean[i]));
    }
  }
}

DecodeProblem shapes(int64_t tokens, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t window,
                     int64_t columns) {
  static const int64_t any = 0;
  DecodeProblem p{};
  p.tokens = tokens;
  p.sequences = sequences;
  p.num_heads = heads;
  p.num_kv_heads = kv_heads;
  p.head_dim = 128;
  p.window = window;
  p.keys = {nullptr, &any, &any, 1, 16, columns};
  return p;
}

TEST(AttentionDecodeHopper, PlansFromShapes) {
  EXPECT_EQ(decode_plan(shapes(1, 1, 32, 8, 4096, 258)).splits, 16);
  EXPECT_EQ(decode_plan(shapes(1, 1, 32, 8, 0, 64)).splits, 4);  // 1024 keys
  EXPECT_EQ(decode_plan(shapes(8, 8, 32, 8, 4096, 258)).splits, 4);
  EXPECT_EQ(decode_plan(shapes(64, 64, 32, 8, 4096, 258)).splits, 1);
  EXPECT_EQ(decode_plan(shapes(1, 1, 8, 1, 0, 1 << 20)).splits, 32);
  EXPECT_EQ(decode_plan(shapes(4, 1, 32, 8, 0, 64)).rows, 16);
  EXPECT_EQ(decode_plan(shapes(5, 1, 32, 8, 0, 64)).rows, 32);
  EXPECT_EQ(decode_plan(shapes(17, 2, 32, 8, 0, 64)).rows, 64);
  const DecodeProblem busy = shapes(64, 64, 32, 8, 4096, 258);
  EXPECT_EQ(decode_workspace_bytes(busy, decode_plan(busy)), 0);
}

TEST(AttentionDecodeHopper, TheCountersOfALaunchFitItsSlot) {
  int64_t most = 0;
  for (int64_t sequences = 1; sequences <= 140; ++sequences) {
    for (const auto& [heads, kv_heads] : {std::pair{32, 8}, {12, 4}, {64, 1}, {5, 1}, {16, 16}}) {
      for (int64_t tokens = 1; tokens <= 64 * sequences; tokens += 1 + tokens / 7) {
        const DecodeProblem p = shapes(tokens, sequences, heads, kv_heads, 0, 1 << 20);
        if (!decode_shapes_fit(p)) continue;
        const DecodePlan plan = decode_plan(p);
        if (plan.splits > 1) most = std::max(most, plan.tiles * kv_heads);
      }
    }
  }
  EXPECT_GT(most, kMaxDecodeArrivals / 2);
  EXPECT_LE(most, kMaxDecodeArrivals);
}

TEST(AttentionDecodeHopper, TakesFewRowsOfAlignedHeads) {
  EXPECT_TRUE(takes_attention_decode_hopper(shapes(16, 1, 32, 8, 0, 64)));
  EXPECT_FALSE(takes_attention_decode_hopper(shapes(17, 1, 32, 8, 0, 64)));
  EXPECT_FALSE(takes_attention_decode_hopper(shapes(1, 1, 65, 1, 0, 64)));
  EXPECT_FALSE(takes_attention_decode_hopper(shapes(0, 0, 32, 8, 0, 64)));
  DecodeProblem p = shapes(1, 1, 32, 8, 0, 64);
  p.head_dim = 96;
  EXPECT_FALSE(takes_attention_decode_hopper(p));
  p.head_dim = 64;
  EXPECT_TRUE(takes_attention_decode_hopper(p));
  p.k = reinterpret_cast<const BFloat16*>(8);
  EXPECT_FALSE(takes_attention_decode_hopper(p));
}

TEST(AttentionDecodeHopper, SplitsShareTheBlocksOfARange) {
  for (const KeyRange& range : {KeyRange{0, 0}, KeyRange{0, 1}, KeyRange{63, 65}, KeyRange{100, 4196}}) {
    for (int splits = 1; splits <= 32; ++splits) {
      int64_t next = range.begin / kDecodeKeys;
      for (int split = 0; split < splits; ++split) {
        const KeyBlocks blocks = split_blocks(range, split, splits);
        if (blocks.begin == blocks.end) continue;
        EXPECT_EQ(blocks.begin, next);
        next = blocks.end;
      }
      EXPECT_EQ(next, (range.end + kDecodeKeys - 1) / kDecodeKeys);
    }
  }
}

// Eight keys of a matrix fragment, and the lanes of a copy, use all banks.
template <int kHeadDim>
void expect_no_bank_conflict() {
  for (int key = 0; key < kDecodeKeys; key += 8) {
    for (int chunk = 0; chunk < kHeadDim / 8; ++chunk) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) banks |= 1u << decode_tile_offset<kHeadDim>(key + i, chunk) / 16 % 8;
      EXPECT_EQ(banks, 0xFFu);
    }
  }
}

TEST(AttentionDecodeHopper, FragmentsHaveNoBankConflicts) {
  expect_no_bank_conflict<64>();
  expect_no_bank_conflict<128>();
}

}  // namespace
}  // namespace mixtral
