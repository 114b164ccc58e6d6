// How the attention of many queries for Hopper cuts its work: tiles, their keys and where those lie.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "ops/sliding_window_attention/hopper/attention_prefill_blocks_hopper.h"

namespace mixtral {
namespace {

TEST(AttentionPrefillBlocks, PrefillKeysCoverWhatTheRowsOfATileSee) {
  for (const int64_t window : {0, 1, 60, 128, 500}) {
    for (int64_t position = -20; position < 700; position += 13) {
      for (const int64_t tokens : {1, 32, 128}) {
        const KeyRange first = visible_keys(position, 900, window, true);
        const KeyRange last = visible_keys(position + tokens - 1, 900, window, true);
        const PrefillKeys keys = prefill_keys(first, last);
        ASSERT_EQ(keys.origin % kBlockKeys, 0);
        for (int64_t key = 0; key < 900; ++key) {
          int64_t seeing = 0;
          for (int64_t i = position; i < position + tokens; ++i) {
            const KeyRange seen = visible_keys(i, 900, window, true);
            seeing += key >= seen.begin && key < seen.end;
          }
          const int64_t relative = key - keys.origin;
          ASSERT_EQ(seeing > 0, relative >= keys.begin && relative < keys.end);
          ASSERT_EQ(seeing == tokens, relative >= keys.all_begin && relative < keys.all_end);
          if (seeing > 0) {
            ASSERT_TRUE(relative >= 0 && relative < keys.blocks * kBlockKeys);
          }
          if (seeing < tokens && relative >= 0 && relative < keys.blocks * kBlockKeys) {
            ASSERT_TRUE(keys.partial(static_cast<int>(relative / kBlockKeys)));
          }
        }
      }
    }
  }
}

TEST(AttentionPrefillBlocks, TilesAreFoundAsElsewhere) {
  const std::vector<int64_t> starts = {0, 5, 5, 45, 45, 78, 300, 301};
  for (const int64_t sequences : {1, 4, 7}) {
    for (const int64_t group : {1, 3, 4, 128}) {
      const int64_t size = tile_tokens(group), tokens = starts[sequences];
      const PrefillPlan plan = prefill_plan(tokens, sequences, group, 1, {});
      ASSERT_EQ(plan.tiles, num_query_tiles(tokens, sequences, size));
      for (int tile = 0; tile < plan.tiles; ++tile) {
        const QueryTile expected = query_tile(starts.data(), sequences, size, tile);
        const QueryTile found = prefill_query_tile(starts.data(), sequences, tokens, plan.tile_tokens, tile);
        ASSERT_EQ(found.begin, expected.begin);
        ASSERT_EQ(found.end, expected.end);
        if (found.begin < found.end) {
          ASSERT_EQ(found.sequence, expected.sequence);
        }
      }
      for (int row = 0; row < kTileRows; ++row) ASSERT_EQ(plan.row_token(row), row / group);
    }
  }
  for (const int64_t wrong : {int64_t{-1}, int64_t{302}, int64_t{1} << 40, -(int64_t{1} << 40)}) {
    std::vector<int64_t> bad = starts;
    bad[3] = wrong;
    for (int tile = 0; tile < 310; ++tile) {
      const QueryTile found = prefill_query_tile(bad.data(), 7, 301, 32, tile);
      ASSERT_TRUE(found.sequence >= 0 && found.sequence < 7);
      ASSERT_GE(found.begin, 0);
    }
  }
}

TEST(AttentionPrefillBlocks, BoxesLieWhereTheKeysAre) {
  std::vector<int64_t> page_table(2 * 37);
  for (size_t i = 0; i < page_table.size(); ++i) page_table[i] = static_cast<int64_t>((i * 31 + 5) % 80) - 2;
  const std::vector<int64_t> starts = {0, 300, 1000};
  for (const int64_t page_size : {8, 64, 128, 384}) {
    for (const int64_t columns : {1, 5, 37}) {
      KeyLayout paged;
      paged.kv_lens = paged.page_table = page_table.data();
      paged.pages = 70;
      paged.page_size = page_size;
      paged.columns = columns;
      KeyLayout packed;
      packed.cu_seqlens = starts.data();
      packed.pages = 1;
      packed.page_size = 1000;
      for (const int64_t first : {int64_t{0}, int64_t{128}, int64_t{1} << 40, (int64_t{1} << 51) + 384}) {
        for (const KeyLayout& keys : {paged, packed}) {
          const PrefillPlan plan = prefill_plan(1, 1, 1, 1, keys);
          const int64_t start = first + (keys.page_table && page_size < kBlockKeys ? page_size * 3 : 0) % kBlockKeys;
          KeyBoxes boxes(keys, plan, 1, start);
          for (int64_t position = start; position < start + 60 * kBlockKeys; position += kBlockKeys) {
            const int64_t row = keys.row(1, position);
            const KeyBox box = boxes.next();
            ASSERT_EQ(box.page, row < 0 ? keys.pages : row / keys.page_size) << position;
            ASSERT_EQ(box.row, row < 0 ? 0 : row % keys.page_size) << position;
          }
        }
      }
    }
  }
}

TEST(AttentionPrefillBlocks, QuotientsAreThoseOfIntegers) {
  std::mt19937_64 random(5);
  for (int i = 0; i < 20000; ++i) {
    const int divisor = i % 3 == 0 ? 1 + static_cast<int>(random() % 100) : 1 + static_cast<int>(random() >> 33);
    const int64_t largest = int64_t{1} << (1 + random() % 52), x = static_cast<int64_t>(random() % largest);
    for (const int64_t y : {x, x / divisor * divisor, std::max<int64_t>(x / divisor * divisor - 1, 0)}) {
      const Quotient found = divide_by(y, divisor, 1.0 / divisor);
      ASSERT_EQ(found.quotient, y / divisor) << y << " / " << divisor;
      ASSERT_EQ(found.remainder, y % divisor);
    }
  }
}

}  // namespace
}  // namespace mixtral
