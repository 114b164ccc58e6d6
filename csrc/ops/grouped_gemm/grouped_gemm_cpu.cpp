// A block of out is computed from panels of a and b that are kBlockDepth deep. Many rows: both panels are first
// converted to f32 in a scratch buffer that fits the L2 cache. Few rows (decode): they are read in place, column after
// column, as fast as memory gives the weights.
//
// Every element of out owns 16 partial sums, kept in memory from panel to panel. Its products are added in the same
// order on both ways, whatever the tile, the number of rows or the thread.
#include <algorithm>
#include <type_traits>

#include "../cpu/simd.h"
#include "grouped_gemm.h"
#include "tiles.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kBlockDepth = 512, kTileRows = 4, kTileColumns = 6;
constexpr int64_t kFewRows = 8;  // f16 is always packed: its conversion vectorises in a loop of its own only

struct Scratch {
  alignas(64) float a[kGemmBlockRows * kBlockDepth];
  alignas(64) float b[kGemmBlockColumns * kBlockDepth];
  alignas(64) Lanes sums[kGemmBlockRows * kGemmBlockColumns];
};

// A panel of a or b: rows of `depth` values, `stride` apart.
template <typename T>
struct Panel {
  const T* data;
  int64_t stride, rows, depth;
};

template <typename T>
MIXTRAL_INLINE Panel<float> pack_panel(const Panel<T>& source, float* target) {
  const int64_t full = source.depth / kLanes * kLanes, tail = source.depth - full;
  for (int64_t r = 0; r < source.rows; ++r) {
    const T* from = source.data + r * source.stride;
    float* to = target + r * kBlockDepth;
    for (int64_t k = 0; k < full; k += kLanes) *reinterpret_cast<Lanes*>(to + k) = load_lanes(from + k);
    for (int64_t k = full; k < full + tail; ++k) to[k] = to_float(from[k]);
  }
  return {target, kBlockDepth, source.rows, source.depth};
}

// sums [Rows, kTileColumns] += the products of rows r, r + 1, ... of a with rows c, c + 1, ... of b.
template <int64_t Rows, typename T>
MIXTRAL_INLINE void multiply_tile(const Panel<T>& a, int64_t r, const Panel<T>& b, int64_t c, Lanes* sums) {
  const T* left_rows = a.data + r * a.stride;
  const T* right_rows[kTileColumns];  // behind the last one, that one again: its sums are not used
  for (int64_t j = 0; j < kTileColumns; ++j) right_rows[j] = b.data + std::min(c + j, b.rows - 1) * b.stride;
  const int64_t full = a.depth / kLanes * kLanes, tail = a.depth - full;
  Lanes sum[Rows][kTileColumns] = {};
  for (int64_t k = 0; k < full; k += kLanes) {
    Lanes right[kTileColumns];
#pragma GCC unroll 6
    for (int64_t j = 0; j < kTileColumns; ++j) right[j] = load_lanes(right_rows[j] + k);
#pragma GCC unroll 6
    for (int64_t i = 0; i < Rows; ++i) {
      const Lanes left = load_lanes(left_rows + i * a.stride + k);
#pragma GCC unroll 6
      for (int64_t j = 0; j < kTileColumns; ++j) fma_lanes(sum[i][j], left, right[j]);
    }
  }
  // Each panel is summed alone and then added: shorter chains of additions than one over all of K, so smaller errors.
  for (int64_t i = 0; i < Rows; ++i) {
    for (int64_t j = 0; j < kTileColumns; ++j) {
      if (tail > 0)
        fma_lanes(sum[i][j], load_lanes(left_rows + i * a.stride + full, tail), load_lanes(right_rows[j] + full, tail));
      Lanes& total = sums[i * kGemmBlockColumns + j];
      for (int64_t l = 0; l < kLanes; ++l) total.v[l] += sum[i][j].v[l];
    }
  }
}

// All rows of a with rows c to c + kTileColumns - 1 of b.
template <typename T>
MIXTRAL_INLINE void multiply_panels(const Panel<T>& a, const Panel<T>& b, int64_t c, Lanes* sums) {
  int64_t r = 0;
  for (; r + kTileRows <= a.rows; r += kTileRows)
    multiply_tile<kTileRows>(a, r, b, c, sums + r * kGemmBlockColumns + c);
  for (; r < a.rows; ++r) multiply_tile<1>(a, r, b, c, sums + r * kGemmBlockColumns + c);
}

template <typename T>
MIXTRAL_INLINE void multiply_block(const GroupedGemm<T>& gemm, const GemmTile& tile, Scratch& scratch) {
  const int64_t rows = tile.row_end - tile.row_begin, column = tile.column_block * kGemmBlockColumns;
  const int64_t columns = std::min(kGemmBlockColumns, gemm.columns - column);
  const T* a = gemm.a + tile.row_begin * gemm.depth;                         // [rows, Kdim]
  const T* b = gemm.b + (tile.expert * gemm.columns + column) * gemm.depth;  // [columns, Kdim]
  const auto panel = [&](const T* data, int64_t count, int64_t k) {
    return Panel<T>{data + k, gemm.depth, count, std::min(kBlockDepth, gemm.depth - k)};
  };
  std::fill_n(scratch.sums, rows * kGemmBlockColumns, Lanes{});
  if (rows <= kFewRows && !std::is_same_v<T, Half>) {
    for (int64_t c = 0; c < columns; c += kTileColumns)
      for (int64_t k = 0; k < gemm.depth; k += kBlockDepth)
        multiply_panels(panel(a, rows, k), panel(b, columns, k), c, scratch.sums);
  } else {
    for (int64_t k = 0; k < gemm.depth; k += kBlockDepth) {
      const Panel<float> packed_a = pack_panel(panel(a, rows, k), scratch.a);
      const Panel<float> packed_b = pack_panel(panel(b, columns, k), scratch.b);
      for (int64_t c = 0; c < columns; c += kTileColumns) multiply_panels(packed_a, packed_b, c, scratch.sums);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      gemm.out[(tile.row_begin + r) * gemm.columns + column + c] =
          from_float<T>(sum_lanes(scratch.sums[r * kGemmBlockColumns + c]));
}

}  // namespace

template <typename T>
void launch_grouped_gemm_cpu(const GroupedGemm<T>& gemm, int64_t begin, int64_t end) {
  Scratch scratch;
  const int64_t column_blocks = ceil_div(gemm.columns, kGemmBlockColumns);
  for (int64_t i = begin; i < end; ++i)
    multiply_block(gemm, find_gemm_tile(gemm.offs, gemm.experts, gemm.rows, kGemmBlockRows, column_blocks, i), scratch);
}

template void launch_grouped_gemm_cpu(const GroupedGemm<float>&, int64_t, int64_t);
template void launch_grouped_gemm_cpu(const GroupedGemm<BFloat16>&, int64_t, int64_t);
template void launch_grouped_gemm_cpu(const GroupedGemm<Half>&, int64_t, int64_t);

}  // namespace mixtral
