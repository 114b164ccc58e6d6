// The inner product of every CPU kernel: rows times one panel of 32 columns, summed in f32.
//
// A panel is [depth/32][1024] values: per step of 32 depths either f32 [32][32 columns], or bf16 in pair order
// [2 halves][16 pairs][16 columns][2] (amx.h). The sum of an element runs over the depth in one order, which neither
// the number of rows nor the place where a caller cuts the depth changes, as long as cuts are multiples of kSumDepth:
// what a row's result is does not depend on the rows beside it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

namespace mixtral::cpu {

using torch::headeronly::BFloat16;

inline constexpr int64_t kPanelColumns = 32, kStepDepth = 32, kStepElements = kPanelColumns * kStepDepth;
// Shorter sums that are added up have smaller errors than one long chain.
inline constexpr int64_t kSumDepth = 256;

// c [rows, 32] += a [rows, depth] * panel; lda and ldc are the row strides. For bf16, depth is a multiple of 32.
template <typename Operand>
using MicroKernel = void (*)(const Operand* a, int64_t lda, int64_t rows, const Operand* panel, int64_t depth, float* c,
                             int64_t ldc);

// `ahead`: for few rows and a panel that lies in memory, followed by the next one; it is fetched before it is needed.
MicroKernel<float> f32_kernel(bool ahead = false);
// AMX or AVX-512 BF16; null where the instruction set in use has no products of bf16.
MicroKernel<BFloat16> bf16_kernel(bool ahead = false);

// The product of many rows by AMX. Both operands are read tile by tile, so rows come in the order of the tiles,
// [rows/16][depth/32][16][32] with zeros behind the last row, and c is [rows rounded up to 32, 32]. Meanwhile the piece
// of the panel that comes after this one, `next` or null, is fetched into the cache. The bits are those of
// bf16_kernel().
using TileKernel = void (*)(const BFloat16* tiles, int64_t rows, const BFloat16* panel, int64_t depth, float* c,
                            const BFloat16* next);
TileKernel tile_kernel();  // null without AMX

// Sets the tile registers (amx.h) of this thread for 1 to 16 rows.
void set_tile_rows(int64_t rows);

// At the end of a task that has called a micro-kernel or has set the tile registers: gives up the tile registers of
// this thread.
void release_tiles();

}  // namespace mixtral::cpu
