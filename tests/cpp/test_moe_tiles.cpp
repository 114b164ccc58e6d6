// The tile numbering of the grouped GEMM: what the CUDA kernel looks up on the device is proved here, on the CPU.
#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "ops/grouped_gemm/tiles.h"

namespace mixtral {
namespace {

// How often each (row, column block) is in a tile, and the expert it got; every tile is checked against its bounds.
struct Cover {
  std::vector<int> times;
  std::vector<int64_t> expert;
};

Cover cover(const std::vector<int32_t>& offs, int64_t rows, int64_t block_rows, int64_t column_blocks) {
  const IndexArray ends{offs.data(), /*is_int64=*/false};
  const int64_t experts = static_cast<int64_t>(offs.size());
  Cover result{std::vector<int>(rows * column_blocks), std::vector<int64_t>(rows * column_blocks, -1)};
  const int64_t tiles = max_gemm_tiles(experts, rows, block_rows, column_blocks);
  bool ended = false;  // behind the last tile there is none
  for (int64_t i = 0; i < tiles; ++i) {
    const GemmTile tile = find_gemm_tile(ends, experts, rows, block_rows, column_blocks, i);
    ended = ended || tile.expert < 0;
    EXPECT_EQ(tile.expert < 0, ended);
    if (ended) continue;
    EXPECT_LE(tile.expert, experts);
    EXPECT_LT(tile.row_begin, tile.row_end);
    EXPECT_LE(tile.row_end - tile.row_begin, block_rows);
    EXPECT_GE(tile.row_begin, 0);
    EXPECT_LE(tile.row_end, rows);
    EXPECT_LT(tile.column_block, column_blocks);
    for (int64_t r = tile.row_begin; r < tile.row_end; ++r) {
      ++result.times[r * column_blocks + tile.column_block];
      result.expert[r * column_blocks + tile.column_block] = tile.expert;
    }
  }
  return result;
}

void expect_each_row_once(const std::vector<int32_t>& offs, int64_t rows, int64_t block_rows, int64_t column_blocks) {
  const Cover c = cover(offs, rows, block_rows, column_blocks);
  for (int64_t i = 0; i < rows * column_blocks; ++i) {
    ASSERT_EQ(c.times[i], 1) << "row " << i / column_blocks;
    int64_t expert = 0;  // the number of groups that end at or before the row
    while (expert < static_cast<int64_t>(offs.size()) && offs[expert] <= i / column_blocks) ++expert;
    ASSERT_EQ(c.expert[i], expert) << "row " << i / column_blocks;
  }
}

TEST(GemmTiles, CoverEveryRowOnceWhateverTheGroups) {
  expect_each_row_once({5}, 5, 64, 1);
  expect_each_row_once({0, 0, 64, 64, 65, 200}, 200, 64, 3);
  expect_each_row_once({0, 0, 0}, 0, 64, 2);
  expect_each_row_once({1, 2, 3, 4}, 4, 64, 2);
  std::mt19937 random(0);
  for (int trial = 0; trial < 500; ++trial) {
    std::vector<int32_t> offs(1 + random() % 16);
    int32_t end = 0;
    for (int32_t& o : offs) o = end += random() % 3 ? random() % 150 : 0;
    expect_each_row_once(offs, end, 1 + random() % 70, 1 + random() % 3);
  }
}

TEST(GemmTiles, RowsBehindTheLastGroupAreAGroupOfTheirOwn) {
  expect_each_row_once({3, 10}, 17, 4, 2);
  expect_each_row_once({0, 0}, 9, 4, 1);
}

TEST(GemmTiles, UncheckedOffsetsStayWithinTheRows) {
  for (const std::vector<int32_t>& offs :
       {std::vector<int32_t>{7, 3, 12}, {-5, 4, -1}, {INT32_MAX, 0}, {INT32_MIN, INT32_MAX, 1}, {100, 100, 100}}) {
    const Cover c = cover(offs, 12, 4, 2);
    for (const int times : c.times) EXPECT_EQ(times, 1);
  }
}

TEST(GemmTiles, NeighboursShareTheirColumns) {
  const std::vector<int64_t> offs{130, 140};
  const IndexArray ends{offs.data(), /*is_int64=*/true};
  const int64_t columns[] = {0, 0, 0, 1, 1, 1, 0, 1}, experts[] = {0, 0, 0, 0, 0, 0, 1, 1};
  for (int64_t i = 0; i < 8; ++i) {
    const GemmTile tile = find_gemm_tile(ends, 2, 140, 64, 2, i);
    EXPECT_EQ(tile.column_block, columns[i]);
    EXPECT_EQ(tile.expert, experts[i]);
  }
}

// Of 17 row blocks, 9 meet all columns before the other 8 do.
TEST(GemmTiles, ComeInStripsOfAtMost16RowBlocks) {
  const std::vector<int64_t> offs{17};
  const IndexArray ends{offs.data(), /*is_int64=*/true};
  for (int64_t i = 0; i < 17 * 3; ++i) {
    const int64_t strip = i / (9 * 3), height = strip ? 8 : 9, in_strip = i - strip * 9 * 3;
    const GemmTile tile = find_gemm_tile(ends, 1, 17, 1, 3, i);
    EXPECT_EQ(tile.row_begin, strip * 9 + in_strip % height);
    EXPECT_EQ(tile.column_block, in_strip / height);
  }
}

}  // namespace
}  // namespace mixtral
