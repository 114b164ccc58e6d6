// AMX tiles for a product of bf16 matrices, C += A * B with f32 sums.
//
// A tile holds 16 rows of 64 bytes. One step multiplies up to 32 rows of A by 32 columns of B over a depth of 32, in
// four tiles of C, two of A and two of B: each loaded tile is used twice. B comes in "pair order": the two values of a
// column at depths 2p and 2p + 1 lie side by side, so that tile row p is [16 columns][2].
//
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS: within a step, even and
// odd depths are summed separately, each in rising order of p, for any number of rows. A row's bits depend on that row
// and B alone.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

#include "isa.h"

namespace mixtral::cpu {

inline constexpr int64_t kTileRows = 16, kTileDepth = 32;         // rows; bf16 values of one row
inline constexpr int64_t kTileElements = kTileRows * kTileDepth;  // of a B tile: 16 columns at 32 depths

// Tile registers, by number: the instructions take literals only.
//   0 1   C: rows 0-15, columns 0-15 and 16-31      4   A: rows 0-15        6 7   B: columns 0-15 and 16-31
//   2 3   C: rows 16-31                             5   A: rows 16-31
// Sets the tile shapes for `upper` rows (1 to 16) in the upper tiles of C and A, and `lower` (0 to 16) in the lower
// ones. Zeroes all tiles.
MIXTRAL_TARGET_AMX MIXTRAL_INLINE void configure_tiles(int64_t upper, int64_t lower) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64;
  for (const int tile : {0, 1, 4}) config.rows[tile] = static_cast<uint8_t>(upper);
  for (const int tile : {2, 3, 5}) config.rows[tile] = static_cast<uint8_t>(lower > 0 ? lower : 1);
  for (const int tile : {6, 7}) config.rows[tile] = 16;
  // GCC's intrinsic names only the first bytes of its operand: without this, it may drop the stores to the others.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

}  // namespace mixtral::cpu

#endif
