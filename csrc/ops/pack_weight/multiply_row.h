// The products of one row and of a few rows with a quantised block, which is read once and never written out as a
// panel.
#pragma once

#include "pack_weight.h"

namespace mixtral {

// Both give the bits of cpu::bf16_kernel() with the panels of load_panel(). They are null if the instruction set in use
// has no such kernel, and for weights that are not quantised: their panels are used in place, at the speed of memory.

// sums [rows, 32] = a [rows, depth] * block, for up to kMaxFewRows rows.
inline constexpr int64_t kMaxFewRows = 16;
using FewRowsKernel = void (*)(const char* block, const BFloat16* a, int64_t rows, int64_t depth, float* sums);

FewRowsKernel few_rows_kernel(WeightFormat format);

// sums [32] = row [depth] * block, where that is faster; the row's values are bf16 ones.
using RowKernel = void (*)(const char* block, const float* row, int64_t depth, float* sums);

RowKernel row_kernel(WeightFormat format);

}  // namespace mixtral
