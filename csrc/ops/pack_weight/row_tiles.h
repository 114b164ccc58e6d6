// Rows times packed blocks in tiles of a few rows, whose sums a kernel keeps in registers. A kernel has
//
//   Operand, kTileRows    the type of a, and the rows of its largest tile, 8 or 4
//   kTwoBlocks            whether it multiplies one row with two blocks at once
//   multiply<kRows>(block, a, depth, sums)
//                         kRows rows of a [kRows, depth], kTileRows or 1 to 4 -> sums [kRows, 32]
//   multiply<1, 2>(block, a, depth, sums, second_block, second_sums)
//                         with kTwoBlocks
//
// What is here needs no target attribute, which cannot be a template's parameter: all instruction sets share it.
#pragma once

#include <type_traits>

#include "pack_weight.h"

namespace mixtral {

// Two blocks at a time, since the sums of one wait for each other. Each half of the blocks is read in order.
template <typename Kernel>
void multiply_row(const char* const* blocks, int64_t count, const typename Kernel::Operand* a, int64_t depth,
                  float* sums) {
  const int64_t pairs = count / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    float* to = sums + i * kPanelColumns;
    Kernel::template multiply<1, 2>(blocks[i], a, depth, to, blocks[i + pairs], to + pairs * kPanelColumns);
  }
  if (count % 2 == 1) Kernel::template multiply<1>(blocks[count - 1], a, depth, sums + (count - 1) * kPanelColumns);
}

// A RowsKernel (weight_kernels.h).
template <typename Kernel>
void multiply_rows(const char* const* blocks, int64_t count, const typename Kernel::Operand* a, int64_t rows,
                   int64_t depth, float* sums) {
  if constexpr (Kernel::kTwoBlocks)
    if (rows == 1) return multiply_row<Kernel>(blocks, count, a, depth, sums);
  for (int64_t i = 0; i < count; ++i) {
    const auto multiply = [&](auto tile, int64_t r) {
      Kernel::template multiply<tile>(blocks[i], a + r * depth, depth, sums + (i * rows + r) * kPanelColumns);
    };
    int64_t r = 0;
    for (; rows - r >= Kernel::kTileRows; r += Kernel::kTileRows)
      multiply(std::integral_constant<int, Kernel::kTileRows>(), r);
    if (rows - r >= 4) {
      multiply(std::integral_constant<int, 4>(), r);
      r += 4;
    }
    if (rows - r == 3) multiply(std::integral_constant<int, 3>(), r);
    if (rows - r == 2) multiply(std::integral_constant<int, 2>(), r);
    if (rows - r == 1) multiply(std::integral_constant<int, 1>(), r);
  }
}

}  // namespace mixtral
