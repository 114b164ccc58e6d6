// Key ranges, cache addresses and query tiles of the attention kernels: what a CUDA block computes for itself, proved
// here.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "ops/sliding_window_attention/attention_index.h"

namespace mixtral {
namespace {

TEST(AttentionIndex, VisibleKeysAreThoseLessThanAWindowBehind) {
  for (int64_t length = 0; length < 40; ++length) {
    for (const int64_t window : {0, 1, 2, 5, 39, 1000}) {
      for (int64_t position = -3; position < length; ++position) {
        const KeyRange range = visible_keys(position, length, window, true);
        for (int64_t key = 0; key < length; ++key) {
          const int64_t distance = position - key;
          const bool seen = distance >= 0 && (window == 0 || distance < window);
          ASSERT_EQ(key >= range.begin && key < range.end, seen) << position << " " << key << " " << window;
        }
      }
    }
  }
}

TEST(AttentionIndex, WithoutCausalityEveryKeyIsVisible) {
  const KeyRange range = visible_keys(-5, 7, 0, false);
  EXPECT_EQ(range.begin, 0);
  EXPECT_EQ(range.end, 7);
}

TEST(AttentionIndex, VisibleKeysNearTheEndsOfInt64) {
  const int64_t far = int64_t{1} << 33, most = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(visible_keys(far, far + 1, 4096, true).begin, far - 4095);
  EXPECT_EQ(visible_keys(far, far + 1, 4096, true).end, far + 1);
  EXPECT_EQ(visible_keys(far, far + 1, most, true).begin, 0);
  EXPECT_EQ(visible_keys(-far, 0, most, true).end, 0);
}

TEST(AttentionIndex, SeeingQueriesAreThoseThatSeeOneOfTheKeys) {
  for (const bool causal : {true, false}) {
    for (const int64_t window : {0, 1, 2, 5, 19, 1000}) {
      if (!causal && window > 0) continue;
      for (int64_t length = 1; length < 16; ++length) {
        for (int64_t queries = 0; queries < 20; ++queries) {
          for (int64_t begin = 0; begin < length; ++begin) {
            for (int64_t end = begin + 1; end <= length; ++end) {
              const QueryRange range = seeing_queries({begin, end}, queries, length, window, causal);
              for (int64_t i = 0; i < queries; ++i) {
                const KeyRange keys = visible_keys(i + length - queries, length, window, causal);
                const bool sees = keys.begin < end && keys.end > begin;
                ASSERT_EQ(i >= range.begin && i < range.end, sees) << i << " " << begin << " " << end;
              }
              ASSERT_TRUE(range.begin >= 0 && range.begin <= range.end && range.end <= queries);
            }
          }
        }
      }
    }
  }
  const int64_t most = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(seeing_queries({3, 5}, 10, 10, most, true).end, 10);
}

TEST(AttentionIndex, PackedKeysFollowOneAnother) {
  const std::vector<int64_t> starts = {0, 3, 3, 10};
  KeyLayout keys;
  keys.cu_seqlens = starts.data();
  keys.pages = 1;
  keys.page_size = 10;
  EXPECT_EQ(keys.length(0), 3);
  EXPECT_EQ(keys.length(1), 0);
  EXPECT_EQ(keys.row(2, 6), 9);
  EXPECT_EQ(keys.row(2, 7), -1);
}

TEST(AttentionIndex, PagesRollAndBadPagesHaveNoRow) {
  const std::vector<int64_t> lens = {9, int64_t{1} << 33},
                             table = {4, 2, -1, 5, 0, 1};  // [B = 2, R = 3], 5 pages of 4 rows
  KeyLayout keys;
  keys.kv_lens = lens.data();
  keys.page_table = table.data();
  keys.pages = 5;
  keys.page_size = 4;
  keys.columns = 3;
  EXPECT_EQ(keys.length(1), int64_t{1} << 33);
  EXPECT_EQ(keys.row(0, 0), 16);
  EXPECT_EQ(keys.row(0, 7), 2 * 4 + 3);
  EXPECT_EQ(keys.row(0, 8), -1);      // page -1
  EXPECT_EQ(keys.row(0, 12), 4 * 4);  // column 3 mod 3
  EXPECT_EQ(keys.row(1, 1), -1);      // page 5 of 5
  EXPECT_EQ(keys.row(1, 6), 2);
  const int64_t far = (int64_t{1} << 33) + 1;  // page 2^31, column 2^31 mod 3 = 2
  EXPECT_EQ(keys.row(1, far), 1 * 4 + 1);
}

// Every query in exactly one tile of its own sequence, whatever the lengths.
TEST(AttentionIndex, TilesCoverEveryQueryOnce) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 500; ++trial) {
    const int64_t sequences = random() % 7, size = 1 + random() % 9;
    std::vector<int64_t> starts = {0};
    for (int64_t b = 0; b < sequences; ++b) starts.push_back(starts.back() + (random() % 3 ? random() % 20 : 0));
    std::vector<int> times(starts.back());
    for (int64_t i = 0; i < num_query_tiles(starts.back(), sequences, size); ++i) {
      const QueryTile tile = query_tile(starts.data(), sequences, size, i);
      ASSERT_LE(tile.end - tile.begin, size);
      if (tile.begin < tile.end) {
        ASSERT_EQ((tile.begin - starts[tile.sequence]) % size, 0);
      }
      for (int64_t t = tile.begin; t < tile.end; ++t) {
        ASSERT_GE(t, starts[tile.sequence]);
        ASSERT_LT(t, starts[tile.sequence + 1]);
        ++times[t];
      }
    }
    for (const int count : times) ASSERT_EQ(count, 1);
  }
}

}  // namespace
}  // namespace mixtral
