// A chunk of rows of one expert is multiplied with a few 32-column panels of its weights at a time (chunk_product.h).
// Each weight is read from memory once per chunk.
#include "../swiglu/swiglu_value.h"
#include "chunk_product.h"
#include "grouped_gemm.h"

namespace mixtral {

using namespace cpu;

namespace {

// A row of the sums of one panel -> `columns` <= 32 values of out.
template <typename T>
MIXTRAL_INLINE void store_row(const float* sums, int64_t columns, T* out) {
  for (int64_t j = 0; j < columns; ++j) out[j] = from_float<T>(sums[j]);
}

template <typename T>
MIXTRAL_INLINE void store_swiglu_row(const float* gate, const float* up, int64_t columns, T* out) {
  for (int64_t j = 0; j < columns; ++j) out[j] = swiglu_value(from_float<T>(gate[j]), from_float<T>(up[j]));
}

// Blocks [block_begin, block_end) of the rows of a chunk of out, which begins at `rows` and is `width` wide.
template <bool kSwiglu, typename T, typename Operand>
void multiply_blocks(const ChunkProduct<T, Operand>& product, T* rows, int64_t width, int64_t block_begin,
                     int64_t block_end) {
  constexpr int64_t kParts = kSwiglu ? 2 : 1, kBlocks = kMaxPanels / kParts;  // gate and up
  const int64_t size = product.sum_rows() * kPanelColumns;                    // of the sums of one panel
  for (int64_t first = block_begin; first < block_end; first += kBlocks) {
    const int64_t blocks = std::min(kBlocks, block_end - first);
    int64_t columns[kMaxPanels];
    for (int64_t i = 0; i < blocks * kParts; ++i)
      columns[i] = (first + i / kParts) * kPanelColumns + i % kParts * width;
    const float* sums = product.multiply(columns, blocks * kParts);
    for_cpu_isa([&] {
      for (int64_t r = 0; r < product.count(); ++r)
        for (int64_t i = 0; i < blocks; ++i) {
          const float* part = sums + i * kParts * size + r * kPanelColumns;
          const int64_t column = (first + i) * kPanelColumns, used = std::min(kPanelColumns, width - column);
          T* out = rows + r * width + column;
          if constexpr (kSwiglu) {
            store_swiglu_row(part, part + size, used, out);
          } else {
            store_row(part, used, out);
          }
        }
    });
  }
}

// The share of this thread of the products of every expert.
template <bool kSwiglu, typename T, typename Operand>
void multiply_share(const GroupedGemm<T>& gemm, GemmWork& work) {
  const int64_t width = kSwiglu ? gemm.b.columns / 2 : gemm.b.columns;
  work.take([&](int64_t expert, int64_t row, int64_t count) {
    const LeftRows<T> rows{gemm.a + row * gemm.b.depth, gemm.b.depth};
    const ChunkProduct<T, Operand> product(rows, gemm.b, expert, count);
    T* out = gemm.out + row * width;
    return [=](int64_t begin, int64_t end) { multiply_blocks<kSwiglu>(product, out, width, begin, end); };
  });
  release_tiles();
}

// The same of the gradients of every expert's weight. A chunk of its rows is summed over the rows of a and grad.
template <typename T, typename Operand>
void multiply_weight_share(const GroupedGemmWeightGradient<T>& gradient, GemmWork& work) {
  const int64_t columns = gradient.columns, depth = gradient.depth;
  work.take([&](int64_t expert, int64_t row, int64_t count) {
    const int64_t begin = expert > 0 ? gradient.offs[expert - 1] : 0, end = gradient.offs[expert];
    const LeftRows<T> rows{gradient.grad + begin * columns + row, columns, /*transposed=*/true};
    const WeightView a{WeightFormat::kTransposed, gradient.a + begin * depth, 1, depth, end - begin};
    const ChunkProduct<T, Operand> product(rows, a, 0, count);
    T* out = gradient.out + (expert * columns + row) * depth;
    return [=](int64_t block, int64_t block_end) { multiply_blocks<false>(product, out, depth, block, block_end); };
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

template <typename T>
void launch_grouped_gemm_backward_weight_cpu(const GroupedGemmWeightGradient<T>& gradient, GemmWork& work) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (bf16_kernel()) return multiply_weight_share<T, BFloat16>(gradient, work);
  multiply_weight_share<T, float>(gradient, work);
}

template void launch_grouped_gemm_cpu(const GroupedGemm<float>&, GemmWork&);
template void launch_grouped_gemm_cpu(const GroupedGemm<BFloat16>&, GemmWork&);
template void launch_grouped_gemm_cpu(const GroupedGemm<Half>&, GemmWork&);
template void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<float>&, GemmWork&);
template void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<BFloat16>&, GemmWork&);
template void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<Half>&, GemmWork&);

template void launch_grouped_gemm_backward_weight_cpu(const GroupedGemmWeightGradient<float>&, GemmWork&);
template void launch_grouped_gemm_backward_weight_cpu(const GroupedGemmWeightGradient<BFloat16>&, GemmWork&);
template void launch_grouped_gemm_backward_weight_cpu(const GroupedGemmWeightGradient<Half>&, GemmWork&);

}  // namespace mixtral
