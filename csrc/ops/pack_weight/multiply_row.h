// The products of one row and of a few rows with a quantised block, which is read once and never written out as a
// panel.
#pragma once

#include "pack_weight.h"

namespace mixtral {

// sums [32] = row [depth] * block; the row's values are bf16 ones. The bits are those of cpu::bf16_kernel() with the
// panels of load_panel().
using RowKernel = void (*)(const char* block, const float* row, int64_t depth, float* sums);

// The kernel of a row [depth]. Null where the instruction set in use has none, for rows out of its range, and for
// weights that are not quantised: tiles, which are read in place, are as fast as memory.
RowKernel row_kernel(WeightFormat format, const BFloat16* row, int64_t depth);

// The same for up to kMaxFewRows rows [rows, depth] -> sums [rows, 32].
inline constexpr int64_t kMaxFewRows = 16;
using FewRowsKernel = void (*)(const char* block, const BFloat16* a, int64_t rows, int64_t depth, float* sums);

// Null where the instruction set in use has none, and for weights that are not quantised.
FewRowsKernel few_rows_kernel(WeightFormat format);

}  // namespace mixtral
