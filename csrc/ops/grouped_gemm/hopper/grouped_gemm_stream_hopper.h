// The grouped GEMM that streams weights on Hopper (decoding, small batches, dense layers of few tokens; packed weights
// with any number of rows): index logic and problem description, shared by the kernel and its host side.
#pragma once

#include <array>

#include "../grouped_gemm.h"
#include "../tiles.h"

namespace mixtral {

// With more rows a product with plain weights is compute-bound: the tile kernel is for them.
inline constexpr int64_t kMaxStreamRows = 1024;

inline constexpr int kMaxRoutedCopies = 64;

// Rows in any order, each with its experts, instead of groups of sorted rows. Row r of a gives rows r * copies,
// r * copies + 1, ... of out, each with the expert in ids at that place. Ids outside [0, E) are ignored: their rows of
// out are not written. All rows of a fit one unit, and out has at most kMaxRoutedCopies.
struct RoutedRows {
  IndexArray ids = {};     // [rows, copies]; data == nullptr: groups
  int64_t copies = 1;      // of each row of a
  bool ids_ready = false;  // ids is complete before the kernel in front lets this one start (..._routing_hopper.cuh)
};

// The problem, without its tensor maps. With SwiGLU, `columns` is I: half of the rows of the weights.
struct StreamGemm {
  BFloat16* out;                          // [rows * routed.copies, columns]
  IndexArray offs;                        // [experts] end offsets; data == nullptr: one group of all rows, or routed
  int64_t experts, rows, columns, depth;  // E, M, columns of out, Kdim
  RoutedRows routed = {};
};

// count / size, rounded up. Sizes and units fit an int (takes_grouped_gemm_stream_hopper): on a GPU, a 64-bit division
// is a call of some 100 instructions.
MIXTRAL_HOST_DEVICE constexpr uint32_t stream_blocks(int64_t count, uint32_t size) {
  return (static_cast<uint32_t>(count) + size - 1) / size;
}

// Whether units are the same for any offs: all rows count as the only expert's. Rows behind its group are then
// multiplied too, and stored as zeros.
MIXTRAL_HOST_DEVICE inline bool units_need_no_offs(const StreamGemm& gemm) {
  return !gemm.offs.data || gemm.experts == 1;
}

// Unit `index` of the work on groups: `unit_columns` columns of out for at most `unit_rows` rows of one expert, the
// units of the same weights next to each other. Where units need no offs, nothing in device memory is read.
MIXTRAL_HOST_DEVICE inline GemmTile find_stream_unit(const StreamGemm& gemm, uint32_t unit_rows, uint32_t unit_columns,
                                                     uint32_t index) {
  const uint32_t blocks = stream_blocks(gemm.columns, unit_columns);
  if (!units_need_no_offs(gemm)) return find_gemm_tile(gemm.offs, gemm.experts, gemm.rows, unit_rows, blocks, index);
  const uint32_t rows = static_cast<uint32_t>(gemm.rows), row_blocks = stream_blocks(rows, unit_rows);
  if (index >= row_blocks * blocks) return {-1, 0, 0, 0};
  const uint32_t column_block = index / row_blocks, row_begin = (index - column_block * row_blocks) * unit_rows;
  return {0, row_begin, row_begin + unit_rows < rows ? row_begin + unit_rows : rows, column_block};
}

// The most units that any offs or ids give.
inline int64_t max_stream_units(const StreamGemm& gemm, int64_t unit_rows, int64_t unit_columns) {
  const int64_t blocks = ceil_div(gemm.columns, unit_columns), copies = gemm.rows * gemm.routed.copies;
  if (gemm.routed.ids.data) return (gemm.experts < copies ? gemm.experts : copies) * blocks;
  return max_gemm_tiles(gemm.experts, gemm.rows, unit_rows, blocks);
}

// The dimensions of the weights in their tensor map: depths, rows of a block, blocks, experts. A block is 32 rows of
// packed fp8, or 8 rows of plain weights. With SwiGLU every expert counts as two, gate and up, and a box has 8 gate
// rows and the up rows of the same features. Strides are in bytes, of all dimensions but the first.
struct StreamWeightBoxes {
  std::array<int64_t, 4> sizes;
  std::array<int64_t, 3> strides;
  std::array<int, 4> box;
};

// For boxes of 128 bytes of each row; without SwiGLU one box has all `unit_rows` rows of a unit.
inline StreamWeightBoxes stream_weight_boxes(const StreamGemm& gemm, bool swiglu, int unit_rows, WeightFormat format) {
  const bool fp8 = format == WeightFormat::kFp8;
  const int halves = swiglu ? 2 : 1, element_bytes = fp8 ? 1 : 2, block_rows = fp8 ? kBlockRows : 8;
  const int64_t row_bytes = gemm.depth * element_bytes, blocks = gemm.columns / block_rows;
  const int64_t block_bytes = fp8 ? packed_block_bytes(format, gemm.depth, 1) : block_rows * row_bytes;
  return {{gemm.depth, block_rows, blocks, gemm.experts * halves},
          {row_bytes, block_bytes, blocks * block_bytes},
          {128 / element_bytes, swiglu ? 8 : block_rows, swiglu ? 1 : unit_rows / block_rows, halves}};
}

// The row of an expert's weights that is row `row` of its tile of 64 rows number `tile`. With SwiGLU a tile is 8 gate
// rows, 8 up rows, 8 gate rows, ... of 32 features.
MIXTRAL_HOST_DEVICE inline int64_t stream_weight_row(int64_t columns, bool swiglu, int64_t tile, int row) {
  return swiglu ? row / 8 % 2 * columns + tile * 32 + row / 16 * 8 + row % 8 : tile * 64 + row;
}

// The rows of a come in boxes of 8, 16, ..., 256: box i has 8 << i.
inline constexpr int kTokenBoxes = 6;

// The box for so many tokens.
MIXTRAL_HOST_DEVICE constexpr int token_box(int64_t tokens) {
  const int count = static_cast<int>(tokens);  // at most 256
  return (count > 8) + (count > 16) + (count > 32) + (count > 64) + (count > 128);
}

// Whether a kernel here can compute the product: a, b and out aligned to 16 bytes; plain weights, Kdim and columns of
// out multiples of 8, at most kMaxStreamRows rows; or int4 or fp8, columns of out multiples of 32. gemm.offs.data may
// be nullptr: then all rows are one group, and E is 1. With one expert, weights are read while the kernel before is
// still running.
bool takes_grouped_gemm_stream_hopper(const GroupedGemm<BFloat16>& gemm, bool swiglu);

// The same for rows that go to `copies` experts each: few enough for one unit, and their copies for a block's table.
bool takes_routed_gemm_stream_hopper(const GroupedGemm<BFloat16>& gemm, int64_t copies, bool swiglu);

// For any b but fp8. With `swiglu` b is [E, 2I, Kdim] and out [M, I] has the bits of the product followed by swiglu. If
// `routed` has ids, gemm.offs has none. Returns a cudaError_t.
int launch_grouped_gemm_stream_hopper(const GroupedGemm<BFloat16>& gemm, const RoutedRows& routed, bool swiglu,
                                      cudaStream_t stream);

// Rows of a as e4m3 numbers, each row with a scale (pack_weight/e4m3.h).
struct E4m3Rows {
  uint8_t* values;  // [M, Kdim]
  float* scales;    // [M]
};

// a [rows, depth] -> out; a and out aligned to 16 bytes, depth a multiple of 8.
int launch_quantize_rows_hopper(const BFloat16* a, const E4m3Rows& out, int64_t rows, int64_t depth,
                                cudaStream_t stream);

// The same product for b of fp8, with the rows `a` instead of gemm.a.
int launch_grouped_gemm_stream_e4m3_hopper(const GroupedGemm<BFloat16>& gemm, const E4m3Rows& a,
                                           const RoutedRows& routed, bool swiglu, cudaStream_t stream);

}  // namespace mixtral
