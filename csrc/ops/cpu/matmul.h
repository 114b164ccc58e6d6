// The inner product of every CPU kernel: rows times one panel of 32 columns, summed in f32.
//
// Panels are laid out as product_order.h says, in f32 or bf16. An element's sum runs over the depth in one order. The
// number of rows does not change it, nor does a caller that splits the depth at multiples of kChainDepth. So the result
// of a row does not depend on the rows beside it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

#include "../product_order.h"

namespace mixtral::cpu {

using torch::headeronly::BFloat16;

// c [rows, 32] += a [rows, depth] * panel; lda and ldc are the row strides. For bf16, depth is a multiple of 32.
template <typename Operand>
using MicroKernel = void (*)(const Operand* a, int64_t lda, int64_t rows, const Operand* panel, int64_t depth, float* c,
                             int64_t ldc);

// `ahead`: the kernel prefetches the panel. For few rows and panels that follow each other in memory.
MicroKernel<float> f32_kernel(bool ahead = false);
// AMX or AVX-512 BF16; null if the instruction set in use has no products of bf16.
MicroKernel<BFloat16> bf16_kernel(bool ahead = false);

// The product of many rows by AMX. Rows are in the order of the tiles that are loaded, [rows/16][depth/32][16][32],
// with zeros after the last row, and c is [rows rounded up to 32, 32]. Meanwhile `next`, the panel to be used next or
// null, is fetched into the cache. The bits are those of bf16_kernel().
using TileKernel = void (*)(const BFloat16* tiles, int64_t rows, const BFloat16* panel, int64_t depth, float* c,
                            const BFloat16* next);
TileKernel tile_kernel();  // null without AMX

// Sets the tile registers (amx.h) of this thread for 1 to 16 rows.
void set_tile_rows(int64_t rows);

// Releases the tile registers of this thread: at the end of a task that has called a micro-kernel or set_tile_rows.
void release_tiles();

}  // namespace mixtral::cpu
