// The attention of many queries for Hopper on the emulated GPU: every query sees exactly its keys, whatever lies next
// to them, and its bits depend on nothing else.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <string>
#include <vector>

#include "gpu_emulator/wgmma.h"
#include "ops/sliding_window_attention/hopper/attention_prefill_hopper.cuh"
#include "ops/sliding_window_attention/hopper/attention_prefill_hopper.h"

namespace mixtral::cuda::prefill {
namespace {

constexpr int64_t kDim = kHeadDim;
const BFloat16 kNan = NAN;

struct Options {
  int64_t window = 0;
  bool causal = true;
  int64_t num_heads = 2, num_kv_heads = 1;
  int64_t page_size = 0;  // 0: packed
};

// A batch: queries, all the keys that its sequences ever had, and where the kernel finds them.
struct Batch {
  Options options;
  std::vector<int64_t> cu_q{0}, cu_k{0}, kv_lens, page_table;
  std::vector<BFloat16> q, keys, values;     // [T, Nq, D], [sum of kv_lens, Nkv, D]
  std::vector<BFloat16> k_stored, v_stored;  // as the kernel reads them
  int64_t pages = 0, columns = 0;

  Batch(const std::vector<std::pair<int64_t, int64_t>>& lengths, const Options& o) : options(o) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (const auto& [queries, length] : lengths) {
      cu_q.push_back(cu_q.back() + queries);
      cu_k.push_back(cu_k.back() + length);
      kv_lens.push_back(length);
    }
    const auto fill = [&](std::vector<BFloat16>& x, int64_t size) {
      x.resize(size);
      for (BFloat16& value : x) value = normal(random);
    };
    fill(q, cu_q.back() * o.num_heads * kDim);
    fill(keys, cu_k.back() * o.num_kv_heads * kDim);
    fill(values, cu_k.back() * o.num_kv_heads * kDim);
  }

  int64_t sequences() const { return static_cast<int64_t>(kv_lens.size()); }
  int64_t row_size() const { return options.num_kv_heads * kDim; }

  AttentionProblem<BFloat16> problem(BFloat16* out) const {
    KeyLayout layout;
    if (options.page_size > 0) {
      layout.kv_lens = kv_lens.data();
      layout.page_table = page_table.data();
      layout.pages = pages;
      layout.page_size = options.page_size;
      layout.columns = columns;
    } else {
      layout.cu_seqlens = cu_k.data();
      layout.pages = 1;
      layout.page_size = cu_k.back();
    }
    return {q.data(),    k_stored.data(),   v_stored.data(),      out,  cu_q.data(),    layout,         cu_q.back(),
            sequences(), options.num_heads, options.num_kv_heads, kDim, options.window, options.causal, 0.1f};
  }

  // Keys that queries see into pages in a random order, the rest of the pool NaN. Pages that no query sees are -1 or
  // past the pool.
  void store() {
    if (options.page_size == 0) {
      k_stored = keys;
      v_stored = values;
      return;
    }
    const int64_t size = options.page_size;
    std::vector<std::pair<int64_t, int64_t>> needed(sequences(), {0, 0});  // first key, end of the pages
    columns = 1;
    pages = 3;
    for (int64_t b = 0; b < sequences(); ++b) {
      const int64_t queries = cu_q[b + 1] - cu_q[b];
      if (queries == 0 || kv_lens[b] == 0) continue;
      const int64_t first =
          visible_keys(std::max<int64_t>(kv_lens[b] - queries, 0), kv_lens[b], options.window, true).begin;
      needed[b] = {first, (kv_lens[b] - 1) / size + 1};
      columns = std::max(columns, needed[b].second - first / size);
      pages += needed[b].second - first / size;
    }
    std::vector<int64_t> order(pages);
    for (int64_t i = 0; i < pages; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), std::mt19937(3));
    page_table.assign(sequences() * columns, -1);
    for (int64_t i = 0; i < static_cast<int64_t>(page_table.size()); i += 2) page_table[i] = pages + 5;
    k_stored.assign(pages * size * row_size(), kNan);
    v_stored = k_stored;
    int64_t next = 0;
    for (int64_t b = 0; b < sequences(); ++b) {
      for (int64_t page = needed[b].first / size; page < needed[b].second; ++page) {
        page_table[b * columns + page % columns] = order[next];
        const int64_t begin = std::max(page * size, needed[b].first);
        for (int64_t key = begin; key < std::min((page + 1) * size, kv_lens[b]); ++key) {
          const int64_t from = (cu_k[b] + key) * row_size(), to = (order[next] * size + key % size) * row_size();
          std::copy_n(&keys[from], row_size(), &k_stored[to]);
          std::copy_n(&values[from], row_size(), &v_stored[to]);
        }
        ++next;
      }
    }
  }

  // blocks: of the grid. counters: two zeros, by which they share the tiles; null: fixed shares.
  std::vector<BFloat16> run(uint64_t seed, int blocks, int* counters) const {
    std::vector<BFloat16> out(q.size(), kNan);
    const auto p = problem(out.data());
    EXPECT_TRUE(takes_attention_prefill_hopper(p));
    TensorMap q_map, k_map, v_map;
    EXPECT_TRUE(prefill_query_map(&q_map, p) && prefill_key_map(&k_map, p, p.k) && prefill_key_map(&v_map, p, p.v));
    const PrefillPlan plan = prefill_plan(p.tokens, p.sequences, p.num_heads / p.num_kv_heads, p.num_kv_heads, p.keys);
    const emulator::Index3 grid{static_cast<unsigned>(std::min(blocks, plan.items)), 1, 1};
    emulator::launch({grid, kPrefillThreads, sizeof(PrefillShared), seed},
                     [&] { attention_prefill_hopper_kernel(p, plan, q_map, k_map, v_map, counters); });
    return out;
  }
  // From a single block to one for every tile.
  std::vector<BFloat16> run(uint64_t seed) const {
    int counters[2] = {};
    auto out = run(seed, std::array{1, 3, 1000}[seed % 3], seed % 2 == 0 ? counters : nullptr);
    EXPECT_EQ(counters[0], 0);
    EXPECT_EQ(counters[1], 0);
    return out;
  }
};

// The definition: query i of a sequence sees key j iff 0 <= i + Lk - Lq - j < W.
bool sees(const Batch& batch, int64_t b, int64_t query, int64_t key) {
  const Options& o = batch.options;
  const int64_t distance = query + batch.kv_lens[b] - (batch.cu_q[b + 1] - batch.cu_q[b]) - key;
  return !o.causal || (distance >= 0 && (o.window == 0 || distance < o.window));
}

// Calls f(sequence, query of the sequence, query head, offset in q and out) for every row.
template <typename F>
void for_each_row(const Batch& batch, const F& f) {
  for (int64_t b = 0; b < batch.sequences(); ++b) {
    for (int64_t token = batch.cu_q[b]; token < batch.cu_q[b + 1]; ++token) {
      for (int64_t head = 0; head < batch.options.num_heads; ++head)
        f(b, token - batch.cu_q[b], head, (token * batch.options.num_heads + head) * kDim);
    }
  }
}

const BFloat16* key_row(const Batch& batch, const std::vector<BFloat16>& rows, int64_t b, int64_t key, int64_t head) {
  const Options& o = batch.options;
  return &rows[((batch.cu_k[b] + key) * o.num_kv_heads + head / (o.num_heads / o.num_kv_heads)) * kDim];
}

// In f64. Weights are rounded to bf16, and so is the result.
void expect_attention(const Batch& batch, const std::vector<BFloat16>& out) {
  for_each_row(batch, [&](int64_t b, int64_t query, int64_t head, int64_t offset) {
    std::vector<double> weights(batch.kv_lens[b]);
    double total = 0;
    for (int64_t key = 0; key < batch.kv_lens[b]; ++key) {
      if (!sees(batch, b, query, key)) continue;
      const BFloat16* k = key_row(batch, batch.keys, b, key, head);
      double score = 0;
      for (int64_t d = 0; d < kDim; ++d) score += double{batch.q[offset + d]} * double{k[d]};
      total += weights[key] = std::exp(score * 0.1f);
    }
    for (int64_t d = 0; d < kDim; ++d) {
      double sum = 0, magnitude = 0;
      for (int64_t key = 0; key < batch.kv_lens[b]; ++key) {
        if (weights[key] == 0) continue;
        const double term = weights[key] / total * double{key_row(batch, batch.values, b, key, head)[d]};
        sum += term;
        magnitude += std::abs(term);
      }
      ASSERT_NEAR(double{out[offset + d]}, sum, (magnitude + std::abs(sum)) / 256) << b << " " << query << " " << head;
    }
  });
}

// With q = 0 all weights are 1, and with small integers as values the mean of what a query sees is exact.
void expect_exact_means(Batch batch, uint64_t seed) {
  std::mt19937 random(11);
  for (BFloat16& x : batch.q) x = 0.0f;
  for (BFloat16& x : batch.values) x = static_cast<float>(static_cast<int>(random() % 17) - 8);
  batch.store();
  const std::vector<BFloat16> out = batch.run(seed);
  for_each_row(batch, [&](int64_t b, int64_t query, int64_t head, int64_t offset) {
    for (int64_t d = 0; d < kDim; ++d) {
      float sum = 0, count = 0;
      for (int64_t key = 0; key < batch.kv_lens[b]; ++key) {
        if (!sees(batch, b, query, key)) continue;
        sum += static_cast<float>(key_row(batch, batch.values, b, key, head)[d]);
        ++count;
      }
      const BFloat16 mean = count == 0 ? 0.0f : sum * (1.0f / count);
      ASSERT_EQ(out[offset + d], mean) << "sequence " << b << " query " << query << " head " << head << " column " << d;
    }
  });
}

std::string bytes(const std::vector<BFloat16>& x) {
  return std::string(reinterpret_cast<const char*>(x.data()), x.size() * sizeof(BFloat16));
}

// Whole prompts, chunks, empty sequences, more queries than keys; ends on and off the borders of blocks and tiles.
const std::vector<std::pair<int64_t, int64_t>> kMixed = {{5, 5},    {0, 3},   {40, 170}, {0, 0},
                                                         {33, 256}, {90, 40}, {3, 0}};

TEST(AttentionPrefillHopper, MatchesAReference) {
  Batch packed(kMixed, {.num_heads = 4});
  packed.store();
  expect_attention(packed, packed.run(1));
  Batch paged({{70, 300}, {20, 20}}, {.window = 150, .num_heads = 4, .num_kv_heads = 2, .page_size = 16});
  paged.store();
  expect_attention(paged, paged.run(2));
}

TEST(AttentionPrefillHopper, PackedQueriesSeeTheirKeysAlone) {
  for (const int64_t window : {0, 1, 7, 129})
    expect_exact_means(Batch(kMixed, {.window = window, .num_heads = 4}), window);
}

TEST(AttentionPrefillHopper, WithoutCausalityQueriesSeeAllKeys) {
  expect_exact_means(Batch(kMixed, {.causal = false}), 1);
}

TEST(AttentionPrefillHopper, EveryGroupOfHeads) {
  const std::vector<std::pair<int64_t, int64_t>> lengths = {{50, 140}, {1, 9}};
  expect_exact_means(Batch(lengths, {.num_heads = 2, .num_kv_heads = 2}), 1);
  expect_exact_means(Batch(lengths, {.window = 30, .num_heads = 6, .num_kv_heads = 2}), 2);  // 126 of 128 rows
  expect_exact_means(Batch({{3, 200}}, {.num_heads = 128}), 3);
}

TEST(AttentionPrefillHopper, KeysInPages) {
  for (const int64_t page_size : {8, 64, 128, 256}) {
    expect_exact_means(Batch({{40, 170}, {0, 9}, {33, 256}}, {.num_heads = 4, .page_size = page_size}), page_size);
    expect_exact_means(Batch({{40, 570}, {33, 390}}, {.window = 100, .num_heads = 4, .page_size = page_size}),
                       page_size);
  }
}

TEST(AttentionPrefillHopper, PositionsBeyond32Bits) {
  Batch batch({{20, 300}}, {.window = 100, .page_size = 16});
  batch.store();
  const std::string expected = bytes(batch.run(1));
  batch.kv_lens[0] += (int64_t{1} << 22) * batch.columns * 16 * kBlockKeys;  // the same pages and blocks, far behind
  EXPECT_EQ(bytes(batch.run(2)), expected);
}

// A page that is none of the pool counts as zeros: no address comes of it.
TEST(AttentionPrefillHopper, BadPagesAreNotRead) {
  Batch batch({{10, 130}}, {.page_size = 64});
  batch.store();
  Batch zeros = batch;
  const int64_t begin = batch.page_table[1] * 64 * kDim;
  std::fill_n(&zeros.k_stored[begin], 64 * kDim, BFloat16(0.0f));
  std::fill_n(&zeros.v_stored[begin], 64 * kDim, BFloat16(0.0f));
  const std::string expected = bytes(zeros.run(0));
  for (const int64_t page : {int64_t{-1}, batch.pages, int64_t{1} << 40}) {
    batch.page_table[1] = page;
    EXPECT_EQ(bytes(batch.run(1)), expected) << page;
  }
}

TEST(AttentionPrefillHopper, ARowHasTheSameBitsAlone) {
  const Options options{.window = 140, .num_heads = 4};
  Batch whole({{9, 60}, {70, 290}}, options);
  whole.store();
  const std::vector<BFloat16> out = whole.run(1);
  for (const int64_t query : {0, 31, 50, 69}) {
    const int64_t length = 290 - 70 + query + 1;
    Batch alone({{1, length}}, options);
    std::copy_n(&whole.q[(9 + query) * 4 * kDim], 4 * kDim, alone.q.begin());
    std::copy_n(&whole.keys[60 * kDim], length * kDim, alone.keys.begin());
    std::copy_n(&whole.values[60 * kDim], length * kDim, alone.values.begin());
    const std::string expected = bytes({&out[(9 + query) * 4 * kDim], &out[(10 + query) * 4 * kDim]});
    for (const int64_t page_size : {0, 32}) {
      alone.options.page_size = page_size;
      alone.store();
      EXPECT_EQ(bytes(alone.run(query)), expected) << query << " " << page_size;
    }
  }
}

TEST(AttentionPrefillHopper, EveryScheduleGivesTheSameBits) {
  Batch batch({{20, 1100}}, {.window = 1000, .num_heads = 4});
  batch.store();
  const std::vector<BFloat16> first = batch.run(0);
  expect_attention(batch, first);
  for (uint64_t seed = 1; seed < 10; ++seed) EXPECT_EQ(bytes(batch.run(seed)), bytes(first)) << seed;
}

// Long and short tiles, some without keys and some of no queries, in one block after the other, with and without
// infinities in the values: nothing of a tile is left for the next one.
TEST(AttentionPrefillHopper, TilesDoNotDependOnTheBlockThatTakesThem) {
  for (const int64_t page_size : {0, 16}) {
    Batch batch({{70, 150}, {0, 40}, {33, 33}, {3, 0}, {1, 260}},
                {.window = 120, .num_heads = 8, .num_kv_heads = 2, .page_size = page_size});
    batch.values[100 * batch.row_size() + 7] = INFINITY;
    batch.values[(batch.cu_k[5] - 1) * batch.row_size() + 100] = NAN;
    batch.store();
    const std::string alone = bytes(batch.run(1, 1000, nullptr));
    int counters[2] = {};
    EXPECT_EQ(bytes(batch.run(2, 1, nullptr)), alone) << page_size;
    EXPECT_EQ(bytes(batch.run(3, 2, nullptr)), alone) << page_size;
    EXPECT_EQ(bytes(batch.run(4, 3, counters)), alone) << page_size;
    EXPECT_TRUE(counters[0] == 0 && counters[1] == 0);
  }
}

TEST(AttentionPrefillHopper, AValueReachesOnlyTheQueriesThatSeeIt) {
  for (const int64_t window : {0, 7, 100}) {
    Batch batch({{40, 150}, {10, 10}}, {.window = window, .num_heads = 2});
    batch.store();
    const std::vector<BFloat16> clean = batch.run(1);
    // 110: of the first query; 127, 128: around the border of blocks; 149: of the last query
    for (const auto& [key, column, value] :
         {std::tuple{15, 0, NAN}, {110, 63, NAN}, {127, 64, INFINITY}, {128, 5, NAN}, {149, 127, -INFINITY}}) {
      batch.v_stored[key * kDim + column] = value;
    }
    const std::vector<BFloat16> out = batch.run(2);
    for_each_row(batch, [&](int64_t b, int64_t query, int64_t head, int64_t offset) {
      for (int64_t d = 0; d < kDim; ++d) {
        bool spoilt = false;
        for (int64_t key = 0; b == 0 && key < 150; ++key)
          spoilt |= sees(batch, b, query, key) && !std::isfinite(float{batch.v_stored[key * kDim + d]});
        const float x = out[offset + d];
        ASSERT_TRUE(spoilt ? !std::isfinite(x) : x == float{clean[offset + d]})
            << "window " << window << " query " << query << " head " << head << " column " << d << " got " << x;
      }
    });
  }
}

TEST(AttentionPrefillHopper, DeclinesWhatItCannotDo) {
  Batch batch({{4, 4}}, {.page_size = 16});
  batch.store();
  std::vector<BFloat16> out(batch.q.size() + 1);
  auto p = batch.problem(out.data());
  EXPECT_TRUE(takes_attention_prefill_hopper(p));
  const auto declines = [&](const auto& change) {
    auto other = p;
    change(other);
    return !takes_attention_prefill_hopper(other);
  };
  EXPECT_TRUE(declines([](auto& x) { x.head_dim = 64; }));
  EXPECT_TRUE(declines([](auto& x) { x.num_heads = 129; }));
  EXPECT_TRUE(declines([](auto& x) { x.scale = 0.0f; }));
  EXPECT_TRUE(declines([](auto& x) { x.tokens = int64_t{1} << 31; }));
  EXPECT_TRUE(declines([](auto& x) { x.keys.pages = 0; }));
  EXPECT_TRUE(declines([](auto& x) { x.keys.pages = int64_t{1} << 27; }));
  EXPECT_TRUE(declines([](auto& x) { x.keys.columns = int64_t{1} << 27; }));
  for (const int64_t size : {1, 4, 12, 48, 96, 192}) EXPECT_TRUE(declines([=](auto& x) { x.keys.page_size = size; }));
  EXPECT_TRUE(declines([](auto& x) { ++x.out; }));
}

}  // namespace
}  // namespace mixtral::cuda::prefill
