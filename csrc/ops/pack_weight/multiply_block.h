// The product of very few rows with a packed or quantised block, which is read once and never written out as a panel.
#pragma once

#include "pack_weight.h"

namespace mixtral {

inline constexpr int64_t kMaxBlockKernelRows = 4;

// sums [rows, 32] = a [rows, depth] * block, 1 to 4 rows of bf16 values; the bits are those of cpu::bf16_kernel().
using BlockKernel = void (*)(const char* block, const float* a, int64_t rows, int64_t depth, float* sums);

// Null where the instruction set in use has no such kernel, and for plain weights.
BlockKernel block_kernel(WeightFormat format);

}  // namespace mixtral
