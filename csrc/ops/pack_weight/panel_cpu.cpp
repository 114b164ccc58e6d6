// Panels of the micro-kernels from weights of every format.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "../cpu/transpose.h"
#include "pack_weight.h"
#include "weight_kernels.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kHalf = kPanelColumns / 2;  // columns of one transposition

// 64 bytes from depth k on of sixteen rows from `column` on, with zeros outside the weight: the transposition reads
// whole words of all sixteen rows.
template <typename T>
class PlainRows {
 public:
  static constexpr int64_t kDepth = 64 / sizeof(T);

  PlainRows(const WeightView& weight, int64_t expert, int64_t column, int64_t k) {
    const T* first = static_cast<const T*>(weight.data) + (expert * weight.columns + column) * weight.depth + k;
    const int64_t columns = std::clamp(weight.columns - column, int64_t{0}, kHalf);
    const int64_t depth = std::clamp(weight.depth - k, int64_t{0}, kDepth);
    const bool inside = columns == kHalf && depth == kDepth;
    if (!inside) std::memset(padded_, 0, sizeof padded_);
    for (int64_t j = 0; j < kHalf; ++j) {
      if (!inside && j < columns) std::memcpy(padded_[j], first + j * weight.depth, depth * sizeof(T));
      rows_[j] = inside ? first + j * weight.depth : padded_[j];
    }
  }
  const void* const* rows() const { return rows_; }

 private:
  const void* rows_[kHalf];
  T padded_[kHalf][kDepth];
};

// A step of bf16 rows in pair order.
void transpose_step(const WeightView& weight, int64_t expert, int64_t column, int64_t k, BFloat16* out) {
  for (int64_t half = 0; half < 2; ++half)
    transpose_words(PlainRows<BFloat16>(weight, expert, column + half * kHalf, k).rows(),
                    out + half * kHalf * kStepDepth, kHalf);
}

void transpose_step(const WeightView& weight, int64_t expert, int64_t column, int64_t k, float* out) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t d = 0; d < kStepDepth; d += kHalf)
      transpose_words(PlainRows<float>(weight, expert, column + half * kHalf, k + d).rows(),
                      out + d * kPanelColumns + half * kHalf, kPanelColumns);
}

// out [32 depths][32 columns] from a step in pair order.
MIXTRAL_INLINE void widen_pairs(const BFloat16* pairs, float* out) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t p = 0; p < kStepDepth / 2; ++p) {
      const BFloat16* from = pairs + (half * kHalf + p) * kStepDepth;
      float* even = out + 2 * p * kPanelColumns + half * kHalf;
      for (int64_t j = 0; j < kHalf; ++j) {
        uint32_t word;
        std::memcpy(&word, from + 2 * j, sizeof word);
        const uint32_t low = word << 16, high = word & 0xffff0000u;
        std::memcpy(even + j, &low, sizeof low);
        std::memcpy(even + kPanelColumns + j, &high, sizeof high);
      }
    }
}

// Up to 32 depths of 32 columns of a weight of the format kTransposed, with zeros outside it.
template <typename T>
class TransposedRows {
 public:
  TransposedRows(const WeightView& weight, int64_t expert, int64_t column, int64_t k)
      : first_(static_cast<const T*>(weight.data) + (expert * weight.depth + k) * weight.columns + column),
        stride_(weight.columns) {
    const int64_t columns = std::min(weight.columns - column, kPanelColumns);
    const int64_t depth = std::min(weight.depth - k, kStepDepth);
    if (columns == kPanelColumns && depth == kStepDepth) return;
    std::memset(static_cast<void*>(padded_), 0, sizeof padded_);
    for (int64_t d = 0; d < depth; ++d)
      std::memcpy(static_cast<void*>(padded_[d]), first_ + d * stride_, columns * sizeof(T));
    first_ = padded_[0];
    stride_ = kPanelColumns;
  }
  TransposedRows(const TransposedRows&) = delete;

  MIXTRAL_INLINE const T* operator[](int64_t d) const { return first_ + d * stride_; }

 private:
  const T* first_;
  int64_t stride_;
  T padded_[kStepDepth][kPanelColumns];
};

// A step in pair order. The local arrays tell the compiler that nothing overlaps.
MIXTRAL_INLINE void zip_step(const TransposedRows<BFloat16>& rows, BFloat16* out) {
  for (int64_t p = 0; p < kStepDepth / 2; ++p)
    for (int64_t half = 0; half < 2; ++half) {
      uint16_t even[kHalf], odd[kHalf];
      uint32_t words[kHalf];
      std::memcpy(even, rows[2 * p] + half * kHalf, sizeof even);
      std::memcpy(odd, rows[2 * p + 1] + half * kHalf, sizeof odd);
      for (int64_t j = 0; j < kHalf; ++j) words[j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
      std::memcpy(static_cast<void*>(out + (half * kHalf + p) * kStepDepth), words, sizeof words);
    }
}

template <typename T>
MIXTRAL_INLINE void widen_step(const TransposedRows<T>& rows, float* out) {
  for (int64_t d = 0; d < kStepDepth; ++d)
    for (int64_t j = 0; j < kPanelColumns; ++j) out[d * kPanelColumns + j] = to_float(rows[d][j]);
}

const BFloat16* load_pairs(const WeightView& weight, int64_t expert, int64_t column, int64_t k, int64_t depth,
                           BFloat16* scratch) {
  const int64_t steps = ceil_div(depth, kStepDepth);
  if (weight.format == WeightFormat::kTransposed) {
    for (int64_t s = 0; s < steps; ++s) {
      const TransposedRows<BFloat16> rows(weight, expert, column, k + s * kStepDepth);
      for_cpu_isa([&] { zip_step(rows, scratch + s * kStepElements); });
    }
    return scratch;
  }
  if (weight.format == WeightFormat::kPlain) {
    for (int64_t s = 0; s < steps; ++s)
      transpose_step(weight, expert, column, k + s * kStepDepth, scratch + s * kStepElements);
    return scratch;
  }
  const char* block = packed_block(weight, expert, column);
  const auto make = weight_kernels(weight.format).bf16_panel;
  if (make == nullptr) return reinterpret_cast<const BFloat16*>(block) + k * kPanelColumns;
  make(block, weight.depth, k / kStepDepth, steps, scratch);
  return scratch;
}

template <typename T>
const float* load_floats(const WeightView& weight, int64_t expert, int64_t column, int64_t k, int64_t depth,
                         float* scratch) {
  const int64_t steps = ceil_div(depth, kStepDepth);
  if (weight.format == WeightFormat::kTransposed) {
    for (int64_t s = 0; s < steps; ++s) {
      const TransposedRows<T> rows(weight, expert, column, k + s * kStepDepth);
      for_cpu_isa([&] { widen_step(rows, scratch + s * kStepElements); });
    }
    return scratch;
  }
  const T* packed =
      static_cast<const T*>(weight.data) + (expert * weight.columns + column) * weight.depth + k * kPanelColumns;
  if constexpr (std::is_same_v<T, float>) {
    if (weight.format == WeightFormat::kPacked) return packed;
    for (int64_t s = 0; s < steps; ++s)
      transpose_step(weight, expert, column, k + s * kStepDepth, scratch + s * kStepElements);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto make = weight.format == WeightFormat::kPlain ? nullptr : weight_kernels(weight.format).f32_panel;
    if (make) {
      make(packed_block(weight, expert, column), weight.depth, k / kStepDepth, steps, scratch);
      return scratch;
    }
    for (int64_t s = 0; s < steps; ++s) {
      BFloat16 pairs[kStepElements];
      const BFloat16* step = load_pairs(weight, expert, column, k + s * kStepDepth, kStepDepth, pairs);
      for_cpu_isa([&] { widen_pairs(step, scratch + s * kStepElements); });
    }
  } else if (weight.format == WeightFormat::kPacked) {
    for_cpu_isa([&] {
      for (int64_t i = 0; i < steps * kStepElements; ++i) scratch[i] = to_float(packed[i]);
    });
  } else {
    const T* rows = static_cast<const T*>(weight.data) + (expert * weight.columns + column) * weight.depth;
    const int64_t columns = std::min(kPanelColumns, weight.columns - column);
    std::fill_n(scratch, steps * kStepElements, 0.0f);
    for_cpu_isa([&] {
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t d = 0; d < std::min(depth, weight.depth - k); ++d)
          scratch[d * kPanelColumns + j] = to_float(rows[j * weight.depth + k + d]);
    });
  }
  return scratch;
}

}  // namespace

template <typename T, typename Operand>
const Operand* load_panel(const WeightView& weight, int64_t expert, int64_t column, int64_t k, int64_t depth,
                          Operand* scratch) {
  if constexpr (std::is_same_v<Operand, BFloat16>) {
    return load_pairs(weight, expert, column, k, depth, scratch);
  } else {
    return load_floats<T>(weight, expert, column, k, depth, scratch);
  }
}

template <typename T>
void prefetch_panel(const WeightView& weight, int64_t expert, int64_t column, int64_t k, int64_t depth, int64_t share,
                    int64_t shares) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const bool transposed = weight.format == WeightFormat::kTransposed;
  if (!transposed && weight.format != WeightFormat::kPlain) return;
  const int64_t columns = std::min(kPanelColumns, weight.columns - column), depths = std::min(depth, weight.depth - k);
  if (columns <= 0 || depths <= 0) return;
  // Rows of memory, and how many values of each are read.
  const int64_t rows = transposed ? depths : columns, used = transposed ? columns : depths;
  const int64_t stride = transposed ? weight.columns : weight.depth;
  const int64_t row = expert * (transposed ? weight.depth : weight.columns) + (transposed ? k : column);
  const T* first = static_cast<const T*>(weight.data) + row * stride + (transposed ? column : k);
  for (int64_t r = share * rows / shares; r < (share + 1) * rows / shares; ++r)
    for (int64_t i = 0; i < used; i += kLine) __builtin_prefetch(first + r * stride + i, 0, 2);
}

template void prefetch_panel<float>(const WeightView&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
template void prefetch_panel<Half>(const WeightView&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
template void prefetch_panel<BFloat16>(const WeightView&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);

template const float* load_panel<float, float>(const WeightView&, int64_t, int64_t, int64_t, int64_t, float*);
template const float* load_panel<Half, float>(const WeightView&, int64_t, int64_t, int64_t, int64_t, float*);
template const float* load_panel<BFloat16, float>(const WeightView&, int64_t, int64_t, int64_t, int64_t, float*);
template const BFloat16* load_panel<BFloat16, BFloat16>(const WeightView&, int64_t, int64_t, int64_t, int64_t,
                                                        BFloat16*);

}  // namespace mixtral
