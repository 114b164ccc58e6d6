// For each expert, a chunk of its rows meets a few 32-column panels of its weights at a time. Panels are walked along
// the depth in pieces that stay in the cache while all the rows pass over them; sums are kept in f32 between pieces.
// Each weight is read from memory once per chunk, and each piece of rows serves several panels.
//
// What is multiplied is bf16 where the instruction set has products of bf16 (and the weights are), f32 otherwise.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "../swiglu/swiglu_value.h"
#include "grouped_gemm.h"
#include "tiles.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kChunkRows = 512, kFewRows = 32;  // few: rows and weights are used where they lie
constexpr int64_t kPieceDepth = 512;                // a multiple of kSumDepth
constexpr int64_t kMaxPanels = 8;

int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

// A buffer that each thread keeps from call to call.
template <typename Operand>
struct Scratch {
  std::vector<Operand> rows, panel;
  std::vector<float> sums;  // [panels, rows, 32]
};

template <typename Operand>
Scratch<Operand>& thread_scratch() {
  thread_local Scratch<Operand> scratch;
  return scratch;
}

template <typename V>
V* grown(std::vector<V>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

// rows [count, depth] of stride `stride` -> out [count, padded depth], zero behind each row.
template <typename T, typename Operand>
void copy_rows(const T* rows, int64_t stride, int64_t count, int64_t depth, Operand* out) {
  const int64_t padded = round_up(depth, kStepDepth);
  for (int64_t r = 0; r < count; ++r, rows += stride, out += padded) {
    if constexpr (std::is_same_v<T, Operand>) {
      std::memcpy(out, rows, depth * sizeof(T));
    } else {
      for (int64_t k = 0; k < depth; ++k) out[k] = to_float(rows[k]);
    }
    std::fill(out + depth, out + padded, Operand(0.0f));
  }
}

// Sums [panels, count, 32] of `count` rows of a from `row` on with the panels at `columns` of an expert.
template <typename T, typename Operand>
const float* multiply(const GroupedGemm<T>& gemm, MicroKernel<Operand> kernel, int64_t expert, int64_t row,
                      int64_t count, const int64_t* columns, int64_t panels) {
  const int64_t depth = gemm.b.depth;
  const bool same_type = std::is_same_v<T, Operand>, few = count <= kFewRows;
  const bool rows_in_place = same_type && few && depth % kStepDepth == 0;
  const bool whole_depth = rows_in_place && gemm.b.format == WeightFormat::kPacked;
  const int64_t piece = whole_depth ? depth : kPieceDepth;
  auto& scratch = thread_scratch<Operand>();
  float* sums = grown(scratch.sums, panels * count * kPanelColumns);
  std::fill_n(sums, panels * count * kPanelColumns, 0.0f);
  for (int64_t k = 0; k < depth; k += piece) {
    const int64_t size = std::min(piece, depth - k), padded = round_up(size, kStepDepth);
    const T* a = gemm.a + row * depth + k;
    const Operand* rows = nullptr;
    if (rows_in_place) {
      rows = reinterpret_cast<const Operand*>(a);
    } else {
      Operand* copy = grown(scratch.rows, count * padded);
      for_cpu_isa([&] { copy_rows(a, depth, count, size, copy); });
      rows = copy;
    }
    Operand* buffer = whole_depth ? nullptr : grown(scratch.panel, padded * kPanelColumns);
    for (int64_t i = 0; i < panels; ++i) {
      const Operand* panel = load_panel<T>(gemm.b, expert, columns[i], k, size, buffer);
      kernel(rows, rows_in_place ? depth : padded, count, panel, padded, sums + i * count * kPanelColumns,
             kPanelColumns);
    }
  }
  return sums;
}

// sums [count, 32] -> out, `columns` <= 32 of a row of length `stride`.
template <typename T>
MIXTRAL_INLINE void store(const float* sums, int64_t count, T* out, int64_t stride, int64_t columns) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t j = 0; j < columns; ++j) out[r * stride + j] = from_float<T>(sums[r * kPanelColumns + j]);
}

template <typename T>
MIXTRAL_INLINE void store_swiglu(const float* gate, const float* up, int64_t count, T* out, int64_t stride,
                                 int64_t columns) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t j = 0; j < columns; ++j)
      out[r * stride + j] =
          swiglu_value(from_float<T>(gate[r * kPanelColumns + j]), from_float<T>(up[r * kPanelColumns + j]));
}

// Calls visit(expert, row, count) for chunks of the rows [range.row_begin, range.row_end) of each expert.
template <typename T, typename Visit>
void for_each_chunk(const GroupedGemm<T>& gemm, const GemmRange& range, const Visit& visit) {
  int64_t group_begin = 0;
  for (int64_t expert = 0; expert < gemm.b.experts; ++expert) {
    const int64_t begin = std::max(group_begin, range.row_begin);
    group_begin = gemm.offs[expert];
    const int64_t rows = std::min(group_begin, range.row_end) - begin;
    if (rows <= 0) continue;
    const int64_t chunk = round_up(ceil_div(rows, ceil_div(rows, kChunkRows)), kFewRows);
    for (int64_t row = 0; row < rows; row += chunk) visit(expert, begin + row, std::min(chunk, rows - row));
  }
}

template <bool kSwiglu, typename T, typename Operand>
void run(const GroupedGemm<T>& gemm, MicroKernel<Operand> kernel, const GemmRange& range) {
  constexpr int64_t kParts = kSwiglu ? 2 : 1, kBlocks = kMaxPanels / kParts;
  const int64_t width = gemm.b.columns / kParts;  // of out
  for_each_chunk(gemm, range, [&](int64_t expert, int64_t row, int64_t count) {
    for (int64_t first = range.block_begin; first < range.block_end; first += kBlocks) {
      const int64_t blocks = std::min(kBlocks, range.block_end - first);
      int64_t columns[kMaxPanels];
      for (int64_t i = 0; i < blocks * kParts; ++i)
        columns[i] = (first + i / kParts) * kPanelColumns + i % kParts * width;
      const float* sums = multiply(gemm, kernel, expert, row, count, columns, blocks * kParts);
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t column = (first + i) * kPanelColumns, size = count * kPanelColumns;
        T* out = gemm.out + row * width + column;
        const float* part = sums + i * kParts * size;
        const int64_t used = std::min(kPanelColumns, width - column);
        if constexpr (kSwiglu) {
          for_cpu_isa([&] { store_swiglu(part, part + size, count, out, width, used); });
        } else {
          for_cpu_isa([&] { store(part, count, out, width, used); });
        }
      }
    }
  });
  release_tiles();
}

template <bool kSwiglu, typename T>
void run(const GroupedGemm<T>& gemm, const GemmRange& range) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (const auto kernel = bf16_kernel()) return run<kSwiglu>(gemm, kernel, range);
  run<kSwiglu>(gemm, f32_kernel(), range);
}

}  // namespace

template <typename T>
void launch_grouped_gemm_cpu(const GroupedGemm<T>& gemm, const GemmRange& range) {
  run<false>(gemm, range);
}

template <typename T>
void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<T>& gemm, const GemmRange& range) {
  run<true>(gemm, range);
}

template void launch_grouped_gemm_cpu(const GroupedGemm<float>&, const GemmRange&);
template void launch_grouped_gemm_cpu(const GroupedGemm<BFloat16>&, const GemmRange&);
template void launch_grouped_gemm_cpu(const GroupedGemm<Half>&, const GemmRange&);
template void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<float>&, const GemmRange&);
template void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<BFloat16>&, const GemmRange&);
template void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<Half>&, const GemmRange&);

}  // namespace mixtral
