// A tile of out is computed from panels of a and b that are kBlockDepth deep, converted to f32, and small enough for the
// L2 cache. Every element of out owns 16 partial sums, which stay in memory between panels: its products are added in the
// same order whatever the tile, the number of rows or the thread.
#include "grouped_gemm.h"

#include "../cpu/simd.h"
#include "tiles.h"

#include <algorithm>

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kBlockDepth = 512, kTileRows = 4, kTileColumns = 4;

struct Panels {
  alignas(64) float a[kGemmBlockRows * kBlockDepth];
  alignas(64) float b[kGemmBlockColumns * kBlockDepth];
  alignas(64) Lanes sums[kGemmBlockRows * kGemmBlockColumns];
};

// source [rows, depth] with a row stride -> panel [padded_rows, kBlockDepth] in f32, zero outside of the source.
template <typename T>
MIXTRAL_INLINE void pack_panel(const T* source, int64_t stride, int64_t rows, int64_t padded_rows, int64_t depth,
                               float* panel) {
  const int64_t full = depth / kLanes * kLanes;
  for (int64_t r = 0; r < padded_rows; ++r) {
    Lanes* row = reinterpret_cast<Lanes*>(panel + r * kBlockDepth);
    const int64_t valid = r < rows ? full : 0, tail = r < rows ? depth - full : 0;
    for (int64_t k = 0; k < valid; k += kLanes) *row++ = load_lanes(source + r * stride + k);
    if (tail > 0) *row++ = load_lanes(source + r * stride + full, tail);
    for (int64_t k = valid + (tail > 0 ? kLanes : 0); k < depth; k += kLanes) *row++ = Lanes{};
  }
}

// sums [Rows, kTileColumns] += a [Rows, kBlockDepth] * b [kTileColumns, kBlockDepth]^T over `depth` values.
template <int64_t Rows>
MIXTRAL_INLINE void multiply_tile(const float* a, const float* b, int64_t depth, Lanes* sums) {
  Lanes sum[Rows][kTileColumns];
  for (int64_t r = 0; r < Rows; ++r)
    for (int64_t c = 0; c < kTileColumns; ++c) sum[r][c] = sums[r * kGemmBlockColumns + c];
  for (int64_t k = 0; k < depth; k += kLanes) {
    Lanes right[kTileColumns];
#pragma GCC unroll 4
    for (int64_t c = 0; c < kTileColumns; ++c) right[c] = load_lanes(b + c * kBlockDepth + k);
#pragma GCC unroll 4
    for (int64_t r = 0; r < Rows; ++r) {
      const Lanes left = load_lanes(a + r * kBlockDepth + k);
#pragma GCC unroll 4
      for (int64_t c = 0; c < kTileColumns; ++c) fma_lanes(sum[r][c], left, right[c]);
    }
  }
  for (int64_t r = 0; r < Rows; ++r)
    for (int64_t c = 0; c < kTileColumns; ++c) sums[r * kGemmBlockColumns + c] = sum[r][c];
}

MIXTRAL_INLINE void multiply_panels(Panels& panels, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t c = 0; c < columns; c += kTileColumns) {
    const float* b = panels.b + c * kBlockDepth;
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows)
      multiply_tile<kTileRows>(panels.a + r * kBlockDepth, b, depth, panels.sums + r * kGemmBlockColumns + c);
    for (; r < rows; ++r)
      multiply_tile<1>(panels.a + r * kBlockDepth, b, depth, panels.sums + r * kGemmBlockColumns + c);
  }
}

template <typename T>
MIXTRAL_INLINE void multiply_block(const GroupedGemm<T>& gemm, const GemmTile& tile, Panels& panels) {
  const int64_t rows = tile.row_end - tile.row_begin, column = tile.column_block * kGemmBlockColumns;
  const int64_t columns = std::min(kGemmBlockColumns, gemm.columns - column);
  const int64_t padded_columns = ceil_div(columns, kTileColumns) * kTileColumns;
  const T* a = gemm.a + tile.row_begin * gemm.depth;                           // [rows, Kdim]
  const T* b = gemm.b + (tile.expert * gemm.columns + column) * gemm.depth;  // [columns, Kdim]
  std::fill_n(panels.sums, rows * kGemmBlockColumns, Lanes{});
  for (int64_t k = 0; k < gemm.depth; k += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, gemm.depth - k);
    pack_panel(a + k, gemm.depth, rows, rows, depth, panels.a);
    pack_panel(b + k, gemm.depth, columns, padded_columns, depth, panels.b);
    multiply_panels(panels, rows, padded_columns, depth);
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      gemm.out[(tile.row_begin + r) * gemm.columns + column + c] =
          from_float<T>(sum_lanes(panels.sums[r * kGemmBlockColumns + c]));
}

}  // namespace

template <typename T>
MIXTRAL_MULTIVERSION void launch_grouped_gemm_cpu(const GroupedGemm<T>& gemm, int64_t begin, int64_t end) {
  Panels panels;
  const int64_t column_blocks = ceil_div(gemm.columns, kGemmBlockColumns);
  for (int64_t i = begin; i < end; ++i)
    multiply_block(gemm, find_gemm_tile(gemm.offs, gemm.experts, gemm.rows, kGemmBlockRows, column_blocks, i), panels);
}

template void launch_grouped_gemm_cpu(const GroupedGemm<float>&, int64_t, int64_t);
template void launch_grouped_gemm_cpu(const GroupedGemm<BFloat16>&, int64_t, int64_t);
template void launch_grouped_gemm_cpu(const GroupedGemm<Half>&, int64_t, int64_t);

}  // namespace mixtral
