// AMX tiles for a product of bf16 matrices, C += A * B with f32 sums.
//
// A tile holds 16 rows of 64 bytes. One step multiplies up to 32 rows of A by 32 columns of B over a depth of 32, in
// four tiles of C, two of A and two of B: each loaded tile is used twice. B comes in "pair order": the two values of a
// column at depths 2p and 2p + 1 lie side by side, so that tile row p is [16 columns][2].
//
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS: the sums of one step run over p in
// rising order, for even and odd depths apart, whatever the number of rows. A row's bits depend on that row and B
// alone.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

#include "isa.h"

namespace mixtral::cpu {

inline constexpr int64_t kTileRows = 16, kTileDepth = 32;         // rows; bf16 values of one row
inline constexpr int64_t kTileElements = kTileRows * kTileDepth;  // of a B tile: 16 columns at 32 depths

// Tile numbers: the instructions take constants only. C: rows 0-15 and 16-31, columns 0-15 and 16-31.
inline constexpr int kC00 = 0, kC01 = 1, kC10 = 2, kC11 = 3, kA0 = 4, kA1 = 5, kB0 = 6, kB1 = 7;

// Sets the tile shapes for `upper` rows (1 to 16) in C0x and A0, and `lower` (0 to 16) in C1x and A1. Zeroes all tiles.
MIXTRAL_TARGET_AMX MIXTRAL_INLINE void configure_tiles(int64_t upper, int64_t lower) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64;
  for (const int tile : {kC00, kC01, kA0}) config.rows[tile] = static_cast<uint8_t>(upper);
  for (const int tile : {kC10, kC11, kA1}) config.rows[tile] = static_cast<uint8_t>(lower > 0 ? lower : 1);
  for (const int tile : {kB0, kB1}) config.rows[tile] = 16;
  _tile_loadconfig(&config);
}

}  // namespace mixtral::cpu

#endif
