#include <map>
#include <random>

#include "model/memory.h"
#include "model/rolling_kv_cache.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

RollingKVCache make_cache(const Config& config, int64_t page_size, int64_t num_pages, int64_t max_chunk) {
  return RollingKVCache(config, {page_size, num_pages, max_chunk, torch::kCPU, torch::kFloat32});
}

TEST(PackedBatch, LaysOutSequencesOneAfterTheOther) {
  const Batch batch = packed_batch({{5, 6, 7}, {}, {8, 9}}, torch::kCPU);
  EXPECT_TRUE(torch::equal(batch.input_ids, torch::tensor({5, 6, 7, 8, 9}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(batch.positions, torch::tensor({0, 1, 2, 0, 1}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(batch.cu_seqlens, torch::tensor({0, 3, 3, 5}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(batch.offs, torch::tensor({5}, torch::kInt64)));
  EXPECT_FALSE(batch.page_table.defined());
}

TEST(RollingKVCache, SlotsFollowThePageTable) {
  auto cache = make_cache(tiny_config(4, 2, /*window=*/0), 4, 8, 16);
  const int64_t a = cache.add_sequence(), b = cache.add_sequence();
  cache.prepare({{a, {1, 2, 3, 4, 5}}});
  const Batch batch = cache.prepare({{b, {7}}, {a, {6, 7, 8, 9}}});
  EXPECT_TRUE(torch::equal(batch.positions, torch::tensor({0, 5, 6, 7, 8}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(batch.kv_lens, torch::tensor({1, 9}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(batch.cu_seqlens, torch::tensor({0, 1, 5}, torch::kInt64)));
  // Three pages at most, in a power of two of columns.
  EXPECT_TRUE(torch::equal(batch.page_table, torch::tensor({{2, -1, -1, -1}, {0, 1, 3, -1}}, torch::kInt64)));
  EXPECT_TRUE(torch::equal(batch.slot_mapping, torch::tensor({8, 5, 6, 7, 12}, torch::kInt64)));
  EXPECT_EQ(cache.pages_in_use(), 4);
  cache.remove_sequence(a);
  EXPECT_EQ(cache.pages_in_use(), 1);
  EXPECT_EQ(cache.length(b), 1);
}

TEST(RollingKVCache, PagesNeededIsBoundedByTheWindow) {
  const Config windowed = tiny_config(4, 2, /*window=*/64), full = tiny_config(4, 2, /*window=*/0);
  EXPECT_EQ(RollingKVCache::pages_needed(windowed, 16, 1, 1 << 20), 5);     // ceil(64 / 16) + 1
  EXPECT_EQ(RollingKVCache::pages_needed(windowed, 16, 512, 1 << 20), 37);  // ceil(575 / 16) + 1
  EXPECT_EQ(RollingKVCache::pages_needed(windowed, 16, 512, 17), 2);
  EXPECT_EQ(RollingKVCache::pages_needed(full, 16, 1, 1 << 20), 1 << 16);
}

// Whatever the pool does, every position that a query may see must be where its key was written.
TEST(RollingKVCache, RandomProgramsKeepEveryVisibleKey) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    const auto pick = [&](int64_t low, int64_t high) {
      return low + static_cast<int64_t>(random() % (high - low + 1));
    };
    const Config config = tiny_config(4, 2, seed % 4 == 0 ? 0 : pick(1, 20));
    const int64_t page_size = pick(1, 5), max_chunk = pick(1, 9), num_pages = 40;
    auto cache = make_cache(config, page_size, num_pages, max_chunk);
    std::map<int64_t, std::vector<int64_t>> written;       // sequence -> slot of each position
    std::map<int64_t, std::pair<int64_t, int64_t>> owner;  // slot -> sequence and position last written there
    for (int step = 0; step < 120; ++step) {
      if (written.size() < 3) written[cache.add_sequence()];
      cache.check_integrity();
      for (auto& [sequence, slots] : written) {
        const int64_t length = static_cast<int64_t>(slots.size()), kept = pick(0, length);
        if (pick(0, 9) > 0) continue;
        const bool truncated = cache.truncate(sequence, kept);
        EXPECT_TRUE(truncated || (config.window > 0 && kept < length));
        if (truncated) slots.resize(static_cast<size_t>(kept));
        ASSERT_EQ(cache.length(sequence), static_cast<int64_t>(slots.size()));
      }
      std::vector<RollingKVCache::Chunk> chunks;
      for (const auto& [sequence, slots] : written)
        if (pick(0, 2) > 0) chunks.push_back({sequence, std::vector<int64_t>(pick(1, max_chunk), 1)});
      const int64_t before = cache.pages_in_use();
      Batch batch;
      try {
        batch = cache.prepare(chunks);
      } catch (const std::runtime_error&) {
        EXPECT_EQ(cache.pages_in_use(), before);
        for (const auto& [sequence, slots] : written) EXPECT_EQ(cache.length(sequence), slots.size());
        cache.remove_sequence(written.begin()->first);
        written.erase(written.begin());
        continue;
      }
      int64_t token = 0;
      for (const auto& chunk : chunks) {
        for (size_t i = 0; i < chunk.input_ids.size(); ++i, ++token) {
          const int64_t slot = batch.slot_mapping[token].item<int64_t>();
          owner[slot] = {chunk.sequence, static_cast<int64_t>(written[chunk.sequence].size())};
          written[chunk.sequence].push_back(slot);
        }
      }
      const int64_t columns = batch.page_table.size(1);
      for (size_t b = 0; b < chunks.size(); ++b) {
        const int64_t length = static_cast<int64_t>(written[chunks[b].sequence].size());
        const int64_t first_query = length - static_cast<int64_t>(chunks[b].input_ids.size());
        const int64_t oldest = config.window ? std::max<int64_t>(0, first_query - config.window + 1) : 0;
        for (int64_t p = oldest; p < length; ++p) {
          const int64_t page = batch.page_table[static_cast<int64_t>(b)][(p / page_size) % columns].item<int64_t>();
          const int64_t slot = page * page_size + p % page_size;
          ASSERT_EQ(slot, written[chunks[b].sequence][static_cast<size_t>(p)]) << "seed " << seed;
          ASSERT_EQ(owner[slot], std::make_pair(chunks[b].sequence, p)) << "seed " << seed;
        }
        if (config.window > 0) {
          const int64_t needed = RollingKVCache::pages_needed(config, page_size, max_chunk, 1 << 30);
          ASSERT_LE(columns, round_up_to_power_of_two(needed)) << "seed " << seed;
        }
      }
    }
    while (!written.empty()) {
      cache.remove_sequence(written.begin()->first);
      written.erase(written.begin());
    }
    EXPECT_EQ(cache.pages_in_use(), 0);
  }
}

TEST(RollingKVCache, TruncateGivesPagesBackUnlessTheWindowHasMovedOn) {
  auto cache = make_cache(tiny_config(4, 2, /*window=*/6), 4, 10, 12);
  const int64_t a = cache.add_sequence();
  cache.prepare({{a, std::vector<int64_t>(12, 1)}});
  cache.prepare({{a, std::vector<int64_t>(3, 1)}});  // keys from 7 on are visible: page 0 went back
  EXPECT_EQ(cache.pages_held(a), 3);
  EXPECT_FALSE(cache.truncate(a, 8));  // would see keys from 3 on
  EXPECT_EQ(cache.length(a), 15);
  EXPECT_EQ(cache.pages_held(a), 3);
  EXPECT_TRUE(cache.truncate(a, 11));  // keys 6 to 10: pages 1 and 2
  EXPECT_EQ(cache.length(a), 11);
  EXPECT_EQ(cache.pages_held(a), 2);
  EXPECT_EQ(cache.pages_in_use(), 2);
  EXPECT_THROW(cache.truncate(a, 12), std::runtime_error);
  EXPECT_THROW(cache.truncate(7, 0), std::runtime_error);
}

TEST(RollingKVCache, ReserveTakesThePagesThatALaterBatchUses) {
  auto cache = make_cache(tiny_config(4, 2, /*window=*/0), 4, 3, 8);
  const int64_t a = cache.add_sequence(), b = cache.add_sequence();
  EXPECT_TRUE(cache.reserve(a, 5));
  EXPECT_TRUE(cache.reserve(a, 3));  // has them
  EXPECT_EQ(cache.pages_in_use(), 2);
  EXPECT_FALSE(cache.reserve(b, 5));
  EXPECT_EQ(cache.pages_in_use(), 2);
  EXPECT_TRUE(cache.reserve(b, 4));
  cache.prepare({{b, {1, 2, 3, 4}}, {a, {1, 2, 3, 4, 5, 6, 7, 8}}});
  EXPECT_EQ(cache.pages_available(), 0);
  cache.check_integrity();
}

TEST(RollingKVCache, CommittedPagesAreSharedAndStay) {
  auto cache = make_cache(tiny_config(4, 2, /*window=*/0), 4, 10, 16);
  std::vector<int64_t> ids = random_ids(11, 101, 1);
  const auto read = [&](int64_t kind) {
    const int64_t sequence = cache.add_sequence(ids, 10, kind);
    const int64_t cached = cache.length(sequence);
    cache.prepare({{sequence, {ids.begin() + cached, ids.end()}}});
    cache.commit(sequence, ids);
    cache.check_integrity();
    return std::make_pair(sequence, cached);
  };
  const auto [a, none] = read(2);
  EXPECT_EQ(none, 0);
  const auto [b, cached] = read(2);
  EXPECT_EQ(cached, 8);
  EXPECT_EQ(cache.pages_in_use(), 2 + 1 + 1);
  EXPECT_EQ(read(1).second, 0);  // another kind of keys
  EXPECT_TRUE(cache.truncate(b, 8));
  EXPECT_THROW(cache.truncate(b, 7), std::runtime_error);  // others may have the page
  cache.remove_sequence(a);
  EXPECT_EQ(cache.pages_in_use(), 2 + 3);
  EXPECT_EQ(cache.pages_cached(), 0);
  cache.discard_sequence(b);
  EXPECT_EQ(cache.pages_in_use(), 3);
  EXPECT_EQ(read(2).second, 0);
}

TEST(RollingKVCache, AsksForMemoryBeforeItAllocates) {
  const Config config = tiny_config(4, 2, /*window=*/0);
  const auto message = [](const auto& make) -> std::string {
    try {
      make();
    } catch (const OutOfMemory& error) {
      return error.what();
    }
    return "";
  };
  const int64_t too_many = 1 << 30;  // pages of 6 KiB
  EXPECT_EQ(message([&] { make_cache(config, 16, too_many, 8); }).find("the key/value cache: needs 6.00 TiB on cpu"),
            0u);
}

TEST(RollingKVCache, AFailedPrepareChangesNothing) {
  auto cache = make_cache(tiny_config(4, 2, /*window=*/0), 4, 3, 8);
  const int64_t a = cache.add_sequence(), b = cache.add_sequence();
  cache.prepare({{a, {1, 2, 3, 4, 5}}});
  const auto message = [&](const std::vector<RollingKVCache::Chunk>& chunks) -> std::string {
    try {
      cache.prepare(chunks);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message({{b, {1}}, {a, {1, 2, 3, 4}}}), "RollingKVCache: the batch needs 2 more pages, got 1 free");
  EXPECT_EQ(message({{a, {1}}, {b, {}}}), "RollingKVCache: a chunk must have 1 to 8 tokens, got 0");
  EXPECT_EQ(message({{a, {1}}, {b, {1, 2, 3, 4, 5, 6, 7, 8, 9}}}),
            "RollingKVCache: a chunk must have 1 to 8 tokens, got 9");
  EXPECT_EQ(message({{a, {1}}, {a, {1}}}),
            "RollingKVCache: a sequence must have one chunk per batch, got two of sequence 0");
  EXPECT_EQ(message({{a, {1}}, {7, {1}}}), "RollingKVCache: sequence must be one that was added, got 7");
  EXPECT_EQ(message({}), "RollingKVCache: chunks must not be empty");
  EXPECT_EQ(cache.length(a), 5);
  EXPECT_EQ(cache.length(b), 0);
  EXPECT_EQ(cache.pages_in_use(), 2);
  EXPECT_EQ(message({{a, {1, 2, 3}}, {b, {1}}}), "");
}

TEST(RollingKVCache, PagesOfOneSequenceServeAnotherInTheSameBatch) {
  auto cache = make_cache(tiny_config(4, 2, /*window=*/1), 4, 3, 8);
  const int64_t a = cache.add_sequence(), b = cache.add_sequence();
  cache.prepare({{a, {1, 2, 3, 4, 5, 6, 7, 8}}});
  // `b` comes first and needs two pages: one is free, the other is behind the window of `a`.
  cache.prepare({{b, {1, 2, 3, 4, 5}}, {a, {9}}});
  EXPECT_EQ(cache.pages_in_use(), 3);
}

}  // namespace
}  // namespace mixtral
