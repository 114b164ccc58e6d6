// A chunk of rows of one expert is multiplied with a few 32-column panels of its weights at a time. The depth is cut
// into slices: the panels of a slice stay in the cache while all rows of the chunk are multiplied with them, and f32
// sums are kept from slice to slice. Each weight is read from memory once per chunk. A few rows, as in decoding, are
// multiplied with packed weights directly, without a panel (weight_kernels.h).
//
// Operands are bf16 if the weights are and the instruction set has products of bf16, f32 otherwise.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../cpu/buffer.h"
#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "../pack_weight/weight_kernels.h"
#include "../swiglu/swiglu_value.h"
#include "gemm_work.h"
#include "grouped_gemm.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kFewRows = GemmWork::kFewRows;  // up to so many, rows and packed weights are not copied
constexpr int64_t kSliceDepth = 512;              // half of it, a multiple of kChainDepth, if panels are made
constexpr int64_t kMaxPanels = 8;

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

// rows [count, depth] of stride `stride` -> out [count, padded depth], with zeros after each row: the micro-kernels
// multiply whole steps, and this memory still holds an earlier call's numbers.
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

// The same in the order of tile_kernel(): out [count rounded up to 32 / 16, padded depth / 32, 16, 32].
void copy_tiles(const BFloat16* rows, int64_t stride, int64_t count, int64_t depth, BFloat16* out) {
  const int64_t padded = round_up(depth, kStepDepth);
  std::memset(static_cast<void*>(out), 0, round_up(count, kFewRows) * padded * sizeof(BFloat16));
  const auto at = [&](int64_t r, int64_t k) { return out + (r / 16 * padded + k) * 16 + r % 16 * kStepDepth; };
  const int64_t whole = depth / kStepDepth * kStepDepth;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t k = 0; k < whole; k += kStepDepth)
      std::memcpy(at(r, k), rows + r * stride + k, kStepDepth * sizeof(BFloat16));
    std::memcpy(at(r, whole), rows + r * stride + whole, (depth - whole) * sizeof(BFloat16));
  }
}

template <typename Operand>
MicroKernel<Operand> micro_kernel(bool ahead) {
  if constexpr (std::is_same_v<Operand, BFloat16>) {
    return bf16_kernel(ahead);
  } else {
    return f32_kernel(ahead);
  }
}

// `count` rows of a from `row` on times panels of an expert's weights.
template <typename T, typename Operand>
class Multiplication {
 public:
  Multiplication(const GroupedGemm<T>& gemm, int64_t expert, int64_t row, int64_t count)
      : gemm_(gemm), expert_(expert), count_(count), a_(gemm.a + row * gemm.b.depth), sum_rows_(count) {
    const int64_t depth = gemm.b.depth;
    if (choose_rows_kernel()) return;
    const bool few = count <= kFewRows;
    rows_in_place_ = few && std::is_same_v<T, Operand> && depth % kStepDepth == 0;
    panels_in_place_ = gemm.b.format == WeightFormat::kPacked && std::is_same_v<T, Operand>;
    slice_ = rows_in_place_ && panels_in_place_ ? depth : panels_in_place_ ? kSliceDepth : kSliceDepth / 2;
    kernel_ = micro_kernel<Operand>(few && panels_in_place_);
    if constexpr (std::is_same_v<Operand, BFloat16>) tile_kernel_ = few ? nullptr : tile_kernel();
    if (tile_kernel_) sum_rows_ = round_up(count, kFewRows);
    if (!rows_in_place_) copy_slices();
  }

  // Rows of the sums of one panel, including padding rows at the end.
  int64_t sum_rows() const { return sum_rows_; }

  // Sums [panels, sum_rows, 32] of the products with the panels at `columns`.
  const float* multiply(const int64_t* columns, int64_t panels) const {
    float* sums = thread_scratch<Operand>().sums.grow(panels * sum_rows_ * kPanelColumns);
    f32_rows_ || bf16_rows_ ? sum_few_rows(columns, panels, sums) : sum_rows(columns, panels, sums);
    if (gemm_.b.format == WeightFormat::kInt8)
      for (int64_t i = 0; i < panels; ++i) scale_columns(columns[i], sums + i * sum_rows_ * kPanelColumns);
    return sums;
  }

 private:
  // Whether there is a kernel that takes so few rows and the packed block itself.
  bool choose_rows_kernel() {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (gemm_.b.format == WeightFormat::kPlain) return false;
      const WeightKernels& kernels = weight_kernels(gemm_.b.format);
      if (count_ <= kernels.most_f32_rows) {
        f32_rows_ = kernels.f32_rows;
        float* copy = thread_scratch<float>().rows.grow(count_ * gemm_.b.depth);
        for_cpu_isa([&] { copy_rows(a_, gemm_.b.depth, count_, gemm_.b.depth, copy); });
      } else if (count_ <= kernels.most_bf16_rows) {
        bf16_rows_ = kernels.bf16_rows;
      }
    }
    return f32_rows_ || bf16_rows_;
  }

  void sum_few_rows(const int64_t* columns, int64_t panels, float* sums) const {
    const char* blocks[kMaxPanels];
    for (int64_t i = 0; i < panels; ++i) blocks[i] = packed_block(gemm_.b, expert_, columns[i]);
    if (f32_rows_) {
      f32_rows_(blocks, panels, thread_scratch<float>().rows.at(0), count_, gemm_.b.depth, sums);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      bf16_rows_(blocks, panels, a_, count_, gemm_.b.depth, sums);
    }
  }

  void sum_rows(const int64_t* columns, int64_t panels, float* sums) const {
    std::fill_n(sums, panels * sum_rows_ * kPanelColumns, 0.0f);
    for (int64_t k = 0; k < gemm_.b.depth; k += slice_) {
      const int64_t size = std::min(slice_, gemm_.b.depth - k);
      const Operand* rows = rows_at(k);
      for (int64_t i = 0; i < panels; ++i) {
        const bool last = i + 1 == panels;
        const Operand* next = panel(columns[last ? 0 : i + 1], last ? k + slice_ : k);
        multiply_slice(rows, columns[i], k, size, next, sums + i * sum_rows_ * kPanelColumns);
      }
    }
  }

  // Sums of one panel of int8 weights, in units of kInt8Unit -> the products.
  void scale_columns(int64_t column, float* sums) const {
    const char* block = packed_block(gemm_.b, expert_, column);
    const auto* scales = reinterpret_cast<const float*>(block + kBlockRows * gemm_.b.depth);
    for_cpu_isa([&] {
      for (int64_t r = 0; r < count_; ++r, sums += kPanelColumns)
        for (int64_t j = 0; j < kPanelColumns; ++j) sums[j] = sums[j] / kInt8Unit * scales[j];
    });
  }

  // All rows, slice by slice, into this thread's buffer.
  void copy_slices() const {
    const int64_t depth = gemm_.b.depth;
    Operand* copy = thread_scratch<Operand>().rows.grow(sum_rows_ * round_up(depth, kStepDepth));
    for (int64_t k = 0; k < depth; k += slice_, copy += sum_rows_ * slice_) {
      const int64_t size = std::min(slice_, depth - k);
      if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<Operand, BFloat16>) {
        if (tile_kernel_) {
          copy_tiles(a_ + k, depth, count_, size, copy);
          continue;
        }
      }
      for_cpu_isa([&] { copy_rows(a_ + k, depth, count_, size, copy); });
    }
  }

  const Operand* rows_at(int64_t k) const {
    if (rows_in_place_) return reinterpret_cast<const Operand*>(a_ + k);
    return thread_scratch<Operand>().rows.at(sum_rows_ * k);
  }

  // The address of a panel that is used in place; null if panels are made, and after the last depth.
  const Operand* panel(int64_t column, int64_t k) const {
    if (!panels_in_place_ || k >= gemm_.b.depth) return nullptr;
    return load_panel<T, Operand>(gemm_.b, expert_, column, k, 0, nullptr);
  }

  void multiply_slice(const Operand* rows, int64_t column, int64_t k, int64_t size, const Operand* next,
                      float* sums) const {
    const int64_t padded = round_up(size, kStepDepth);
    Operand* buffer = panels_in_place_ ? nullptr : thread_scratch<Operand>().panel.grow(padded * kPanelColumns);
    const Operand* panel = load_panel<T>(gemm_.b, expert_, column, k, size, buffer);
    if constexpr (std::is_same_v<Operand, BFloat16>) {
      if (tile_kernel_) return tile_kernel_(rows, count_, panel, padded, sums, next);
    }
    kernel_(rows, rows_in_place_ ? gemm_.b.depth : padded, count_, panel, padded, sums, kPanelColumns);
  }

  const GroupedGemm<T>& gemm_;
  const int64_t expert_, count_;
  const T* a_;
  int64_t sum_rows_, slice_;
  RowsKernel<float> f32_rows_ = nullptr;
  RowsKernel<BFloat16> bf16_rows_ = nullptr;
  MicroKernel<Operand> kernel_ = nullptr;
  TileKernel tile_kernel_ = nullptr;
  bool rows_in_place_, panels_in_place_;
};

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

// Blocks [block_begin, block_end) of `count` rows of out from `row` on.
template <bool kSwiglu, typename T, typename Operand>
void multiply_blocks(const GroupedGemm<T>& gemm, const Multiplication<T, Operand>& multiplication, int64_t row,
                     int64_t count, int64_t block_begin, int64_t block_end) {
  constexpr int64_t kParts = kSwiglu ? 2 : 1, kBlocks = kMaxPanels / kParts;  // gate and up
  const int64_t width = gemm.b.columns / kParts;                              // of out
  for (int64_t first = block_begin; first < block_end; first += kBlocks) {
    const int64_t blocks = std::min(kBlocks, block_end - first);
    int64_t columns[kMaxPanels];
    for (int64_t i = 0; i < blocks * kParts; ++i)
      columns[i] = (first + i / kParts) * kPanelColumns + i % kParts * width;
    const float* sums = multiplication.multiply(columns, blocks * kParts);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t column = (first + i) * kPanelColumns, size = multiplication.sum_rows() * kPanelColumns;
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
}

// The share of this thread.
template <bool kSwiglu, typename T, typename Operand>
void multiply_share(const GroupedGemm<T>& gemm, GemmWork& work) {
  work.take([&](int64_t expert, int64_t row, int64_t count) {
    const Multiplication<T, Operand> multiplication(gemm, expert, row, count);
    return [=, &gemm](int64_t block_begin, int64_t block_end) {
      multiply_blocks<kSwiglu>(gemm, multiplication, row, count, block_begin, block_end);
    };
  });
  release_tiles();
}

template <bool kSwiglu, typename T>
void multiply_in_best_operands(const GroupedGemm<T>& gemm, GemmWork& work) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (bf16_kernel()) return multiply_share<kSwiglu, T, BFloat16>(gemm, work);
  multiply_share<kSwiglu, T, float>(gemm, work);
}

}  // namespace

template <typename T>
void launch_grouped_gemm_cpu(const GroupedGemm<T>& gemm, GemmWork& work) {
  multiply_in_best_operands<false>(gemm, work);
}

template <typename T>
void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<T>& gemm, GemmWork& work) {
  multiply_in_best_operands<true>(gemm, work);
}

template void launch_grouped_gemm_cpu(const GroupedGemm<float>&, GemmWork&);
template void launch_grouped_gemm_cpu(const GroupedGemm<BFloat16>&, GemmWork&);
template void launch_grouped_gemm_cpu(const GroupedGemm<Half>&, GemmWork&);
template void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<float>&, GemmWork&);
template void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<BFloat16>&, GemmWork&);
template void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<Half>&, GemmWork&);

}  // namespace mixtral
