// How the rows of a grouped GEMM are cut into tiles: the one index computation of the CUDA kernels.
//
// Tiles are numbered expert by expert, then strip by strip of up to 16 row blocks, then column block by column block,
// then row block by row block. Neighbours, which run at the same time, use the same columns of the weights, and with
// 4096 depths the rows of a strip stay in L2 (16 MB) until all columns have passed. Where a tile has twice as many
// columns as rows, 132 tiles at a time read least in strips of sqrt(2 * 132) = 16 row blocks.
#pragma once

#include <cstdint>

#include "../host_device.h"
#include "../index_array.h"

namespace mixtral {

struct GemmTile {
  int64_t expert;     // `experts` for rows after the last group, -1 if there is no such tile
  int64_t row_begin;  // rows [row_begin, row_end) of a and out, at most block_rows
  int64_t row_end;
  int64_t column_block;
};

// The end of a group that starts at `begin`. On CUDA offs is unchecked: any values give groups within [0, rows].
MIXTRAL_HOST_DEVICE inline int64_t group_end(IndexArray offs, int64_t expert, int64_t begin, int64_t rows) {
  const int64_t end = offs[expert];
  return end < begin ? begin : end > rows ? rows : end;
}

// Tile `index` of a group's row_blocks * column_blocks, which fit an int: on a GPU, 64-bit divisions are slow.
struct GemmTilePlace {
  int64_t row_block, column_block;
};

MIXTRAL_HOST_DEVICE inline GemmTilePlace place_gemm_tile(uint32_t row_blocks, uint32_t column_blocks, uint32_t index) {
  constexpr uint32_t kMaxHeight = 16;
  const uint32_t strips = (row_blocks + kMaxHeight - 1) / kMaxHeight;
  const uint32_t height = (row_blocks + strips - 1) / strips;  // strips of one height, not one of 16 and one of 1
  const uint32_t top = index / (height * column_blocks) * height;
  const uint32_t left = row_blocks - top, rows = left < height ? left : height;
  index -= top * column_blocks;
  return {top + index % rows, index / rows};
}

// Tile number `index` of the groups into which offs [E] cuts `rows`. Rows after the last group form one more group.
MIXTRAL_HOST_DEVICE inline GemmTile find_gemm_tile(IndexArray offs, int64_t experts, int64_t rows, int64_t block_rows,
                                                   int64_t column_blocks, int64_t index) {
  int64_t begin = 0;
  for (int64_t e = 0; e <= experts; ++e) {
    const int64_t end = e < experts ? group_end(offs, e, begin, rows) : rows;
    const int64_t row_blocks = ceil_div(end - begin, block_rows);
    if (index < row_blocks * column_blocks) {
      const GemmTilePlace place = place_gemm_tile(static_cast<uint32_t>(row_blocks),
                                                  static_cast<uint32_t>(column_blocks), static_cast<uint32_t>(index));
      const int64_t row_begin = begin + place.row_block * block_rows;
      const int64_t row_end = row_begin + block_rows < end ? row_begin + block_rows : end;
      return {e, row_begin, row_end, place.column_block};
    }
    index -= row_blocks * column_blocks;
    begin = end;
  }
  return {-1, 0, 0, 0};
}

// The most tiles that any offs gives: the grid of a launch that may not read offs. Every group has at most one partial
// row block. Callers check that it fits an int.
inline int64_t max_gemm_tiles(int64_t experts, int64_t rows, int64_t block_rows, int64_t column_blocks) {
  const int64_t row_blocks = rows / block_rows + experts + 1;
  return (row_blocks < rows ? row_blocks : rows) * column_blocks;
}

}  // namespace mixtral
