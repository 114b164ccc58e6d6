// The product of a chunk of rows of one expert with panels of the right operand, in f32 sums: what the forward and the
// backward passes of grouped_gemm share.
//
// The depth is cut into slices: the panels of a slice stay in the cache while all rows of the chunk are multiplied with
// them, and f32 sums are kept from slice to slice. A few rows, as in decoding, are multiplied with packed weights
// directly, without a panel (weight_kernels.h).
//
// Operands are bf16 if the inputs are and the instruction set has products of bf16, f32 otherwise.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../cpu/buffer.h"
#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "../pack_weight/weight_kernels.h"
#include "gemm_work.h"
#include "left_rows.h"

namespace mixtral::cpu {

inline constexpr int64_t kFewRows = GemmWork::kFewRows;  // up to so many, rows and packed weights are not copied
inline constexpr int64_t kSliceDepth = 512;              // half of it, a multiple of kChainDepth, if panels are made
inline constexpr int64_t kMaxPanels = 8;
inline constexpr int64_t kFetchRows = 24;  // multiplied between two shares of a prefetch; whole blocks of any kernel

// Memory that each thread keeps from call to call.
template <typename Operand>
struct Scratch {
  Buffer<Operand> rows, panel;
  Buffer<float> sums;  // [panels, rows, 32]
};

template <typename Operand>
Scratch<Operand>& thread_scratch() {
  thread_local Scratch<Operand> scratch;
  return scratch;
}

template <typename Operand>
MicroKernel<Operand> micro_kernel(bool ahead) {
  if constexpr (std::is_same_v<Operand, BFloat16>) {
    return bf16_kernel(ahead);
  } else {
    return f32_kernel(ahead);
  }
}

// `count` rows times panels of an expert's weights.
template <typename T, typename Operand>
class ChunkProduct {
 public:
  ChunkProduct(const LeftRows<T>& rows, const WeightView& b, int64_t expert, int64_t count)
      : b_(b), expert_(expert), count_(count), rows_(rows), sum_rows_(count) {
    if (choose_rows_kernel()) return;
    const bool few = count <= kFewRows;
    rows_in_place_ = few && !rows.transposed && std::is_same_v<T, Operand> && b.depth % kStepDepth == 0;
    panels_in_place_ = b.format == WeightFormat::kPacked && std::is_same_v<T, Operand>;
    slice_ = rows_in_place_ && panels_in_place_ ? b.depth : panels_in_place_ ? kSliceDepth : kSliceDepth / 2;
    kernel_ = micro_kernel<Operand>(few && panels_in_place_);
    if constexpr (std::is_same_v<Operand, BFloat16>) tile_kernel_ = few ? nullptr : tile_kernel();
    if (tile_kernel_) sum_rows_ = round_up(count, kFewRows);
    if (!rows_in_place_) copy_slices();
  }

  int64_t count() const { return count_; }

  // Rows of the sums of one panel, including padding rows at the end.
  int64_t sum_rows() const { return sum_rows_; }

  // Sums [panels, sum_rows, 32] of the products with the panels at `columns`.
  const float* multiply(const int64_t* columns, int64_t panels) const {
    float* sums = thread_scratch<Operand>().sums.grow(panels * sum_rows_ * kPanelColumns);
    f32_rows_ || bf16_rows_ ? sum_few_rows(columns, panels, sums) : sum_rows(columns, panels, sums);
    if (b_.format == WeightFormat::kInt8)
      for (int64_t i = 0; i < panels; ++i) scale_columns(columns[i], sums + i * sum_rows_ * kPanelColumns);
    return sums;
  }

 private:
  // Whether there is a kernel that takes so few rows and the packed block itself.
  bool choose_rows_kernel() {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (b_.format < WeightFormat::kPacked) return false;
      const WeightKernels& kernels = weight_kernels(b_.format);
      if (count_ <= kernels.most_f32_rows) {
        f32_rows_ = kernels.f32_rows;
        copy_rows<false>(rows_, count_, b_.depth, thread_scratch<float>().rows.grow(count_ * b_.depth));
      } else if (count_ <= kernels.most_bf16_rows) {
        bf16_rows_ = kernels.bf16_rows;
      }
    }
    return f32_rows_ || bf16_rows_;
  }

  void sum_few_rows(const int64_t* columns, int64_t panels, float* sums) const {
    const char* blocks[kMaxPanels];
    for (int64_t i = 0; i < panels; ++i) blocks[i] = packed_block(b_, expert_, columns[i]);
    if (f32_rows_) {
      f32_rows_(blocks, panels, thread_scratch<float>().rows.at(0), count_, b_.depth, sums);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      bf16_rows_(blocks, panels, rows_.data, count_, b_.depth, sums);
    }
  }

  void sum_rows(const int64_t* columns, int64_t panels, float* sums) const {
    std::fill_n(sums, panels * sum_rows_ * kPanelColumns, 0.0f);
    for (int64_t k = 0; k < b_.depth; k += slice_) {
      const int64_t size = std::min(slice_, b_.depth - k);
      const Operand* rows = rows_at(k);
      for (int64_t i = 0; i < panels; ++i) {
        const bool last = i + 1 == panels;
        const PanelPlace next{columns[last ? 0 : i + 1], last ? k + slice_ : k};
        multiply_slice(rows, {columns[i], k}, size, next, sums + i * sum_rows_ * kPanelColumns);
      }
    }
  }

  // Sums of one panel of int8 weights, in units of kInt8Unit -> the products.
  void scale_columns(int64_t column, float* sums) const {
    const char* block = packed_block(b_, expert_, column);
    const auto* scales = reinterpret_cast<const float*>(block + kBlockRows * b_.depth);
    for_cpu_isa([&] {
      for (int64_t r = 0; r < count_; ++r, sums += kPanelColumns)
        for (int64_t j = 0; j < kPanelColumns; ++j) sums[j] = sums[j] / kInt8Unit * scales[j];
    });
  }

  // All rows, slice by slice, into this thread's buffer.
  void copy_slices() const {
    Operand* copy = thread_scratch<Operand>().rows.grow(sum_rows_ * round_up(b_.depth, kStepDepth));
    for (int64_t k = 0; k < b_.depth; k += slice_, copy += sum_rows_ * slice_) {
      const int64_t size = std::min(slice_, b_.depth - k);
      tile_kernel_ ? copy_rows<true>(rows_.from_depth(k), count_, size, copy)
                   : copy_rows<false>(rows_.from_depth(k), count_, size, copy);
    }
  }

  const Operand* rows_at(int64_t k) const {
    if (rows_in_place_) return reinterpret_cast<const Operand*>(rows_.data + k);
    return thread_scratch<Operand>().rows.at(sum_rows_ * k);
  }

  struct PanelPlace {
    int64_t column, k;
  };

  // The address of a panel that is used in place; null if panels are made, and after the last depth.
  const Operand* panel(const PanelPlace& at) const {
    if (!panels_in_place_ || at.k >= b_.depth) return nullptr;
    return load_panel<T, Operand>(b_, expert_, at.column, at.k, 0, nullptr);
  }

  // Meanwhile the panel to be used next is fetched.
  void multiply_slice(const Operand* rows, const PanelPlace& at, int64_t size, const PanelPlace& next,
                      float* sums) const {
    const int64_t padded = round_up(size, kStepDepth), stride = rows_in_place_ ? rows_.stride : padded;
    Operand* buffer = panels_in_place_ ? nullptr : thread_scratch<Operand>().panel.grow(padded * kPanelColumns);
    const Operand* panel = load_panel<T>(b_, expert_, at.column, at.k, size, buffer);
    if constexpr (std::is_same_v<Operand, BFloat16>) {
      if (tile_kernel_) return tile_kernel_(rows, count_, panel, padded, sums, this->panel(next));
    }
    if (panels_in_place_) return kernel_(rows, stride, count_, panel, padded, sums, kPanelColumns);
    for (int64_t r = 0; r < count_; r += kFetchRows) {
      prefetch_panel<T>(b_, expert_, next.column, next.k, slice_, r / kFetchRows, ceil_div(count_, kFetchRows));
      kernel_(rows + r * stride, stride, std::min(kFetchRows, count_ - r), panel, padded, sums + r * kPanelColumns,
              kPanelColumns);
    }
  }

  const WeightView b_;
  const int64_t expert_, count_;
  const LeftRows<T> rows_;
  int64_t sum_rows_, slice_;
  RowsKernel<float> f32_rows_ = nullptr;
  RowsKernel<BFloat16> bf16_rows_ = nullptr;
  MicroKernel<Operand> kernel_ = nullptr;
  TileKernel tile_kernel_ = nullptr;
  bool rows_in_place_, panels_in_place_;
};

}  // namespace mixtral::cpu
