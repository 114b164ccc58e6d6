// int4 weights in the order in which the Hopper kernel reads them: the very numbers of the CPU's format
// (pack_weight.h), in tiles of 64 rows and 64 depths that one copy brings.
//
// A weight is value = bf16((n - 7.5) * (e odd ? sqrt(2) : 1)) * 2^(e div 2 - 64) with a nibble n = q + 8 and the scale
// byte e of 32 depths of its row. Rounding sqrt(2) to bf16 first gives the same bf16 for every n (a test says so), so a
// weight is one product of bf16 numbers.
//
//   bytes 0 to 2047     thread t of a warpgroup: word 4 t + k is its operand of depths 16 k to 16 k + 15. Register i of
//   the
//                       operand (row t div 32 * 16 + t mod 32 div 4 + 8 (i mod 2), depths 2 (t mod 4) + 8 (i div 2)
//                       and the next) is bits 4 i to 4 i + 3 and 4 i + 16 to 4 i + 19.
//   bytes 2048 to 2175  the scale bytes: word t div 4 has those of row + 0 and row + 8, for the first and the second 32
//                       depths each
//
// Weights [E, N, Kdim] are tiles [E, N / 64, Kdim / 64], both rounded up; rows are in the order of stream_weight_row.
#pragma once

#include <cstdint>
#include <cstring>

#include "grouped_gemm_stream_hopper.h"

namespace mixtral {

inline constexpr int kInt4TileDepth = 64, kInt4NibbleBytes = 2048, kInt4TileBytes = kInt4NibbleBytes + 128;

MIXTRAL_HOST_DEVICE inline int64_t int4_row_tiles(int64_t columns, bool swiglu) {
  return ceil_div(columns, swiglu ? 32 : 64);
}

// The bf16 numbers of the scale bytes in bits 0 to 7 and 16 to 23, in the halves of the result.
MIXTRAL_HOST_DEVICE constexpr uint32_t int4_scales(uint32_t bytes) {
  constexpr uint32_t kZero = 63 << 7, kSqrt2Mantissa = 0x35;  // scale 0 is 2^-64; two bytes are an exponent
  return bytes * 64 + kZero * 0x10001 - (bytes & 0x00010001) * (64 - kSqrt2Mantissa);
}

struct Int4Place {
  int word, shift;  // of a nibble in a tile
};
MIXTRAL_HOST_DEVICE constexpr Int4Place int4_place(int row, int depth) {
  const int thread = row / 16 * 32 + row % 8 * 4 + depth % 8 / 2;
  const int i = row / 8 % 2 + depth / 8 % 2 * 2;
  return {thread * 4 + depth / 16, 4 * i + depth % 2 * 16};
}
MIXTRAL_HOST_DEVICE constexpr int int4_scale_place(int row, int depth) {
  return kInt4NibbleBytes + (row / 16 * 8 + row % 8) * 4 + row / 8 % 2 * 2 + depth / 32;
}

// Nibble and scale byte of row `row` of an expert at `depth` in the CPU's format.
struct Int4Value {
  uint32_t nibble;
  uint8_t scale;
};
inline Int4Value packed_int4_value(const uint8_t* expert, int64_t weight_depth, int64_t row, int64_t depth) {
  const int64_t j = row % kBlockRows, pair = depth % 32 / 2;
  const uint8_t* step = expert + (row / kBlockRows * (weight_depth / 32) + depth / 32) * kInt4StepBytes;
  uint16_t word;
  std::memcpy(&word, step + kBlockRows + ((j / 16 * 4 + pair / 4) * 32 + j % 16 * 2 + depth % 2) * 2, sizeof word);
  return {word >> pair % 4 * 4 & 15u, step[j]};
}

// The CPU's int4 format of weights [experts, rows, depth] -> tiles. What is rounded up has the nibbles and scales 0: a
// finite number, which meets zeros or is not stored. With `swiglu` rows are 2 I, and I is a multiple of 32.
inline void make_int4_tiles(const uint8_t* packed, int64_t experts, int64_t rows, int64_t depth, bool swiglu,
                            uint8_t* tiles) {
  const int64_t columns = swiglu ? rows / 2 : rows, row_tiles = int4_row_tiles(columns, swiglu);
  const int64_t depth_tiles = ceil_div(depth, kInt4TileDepth);
  std::memset(tiles, 0, experts * row_tiles * depth_tiles * kInt4TileBytes);
  for (int64_t t = 0; t < experts * row_tiles; ++t) {
    const uint8_t* expert = packed + t / row_tiles * (rows / kBlockRows * (depth / 32) * kInt4StepBytes);
    for (int row = 0; row < 64; ++row) {
      const int64_t from = stream_weight_row(columns, swiglu, t % row_tiles, row);
      for (int64_t k = 0; from < rows && k < depth; ++k) {
        const Int4Value value = packed_int4_value(expert, depth, from, k);
        uint8_t* tile = tiles + (t * depth_tiles + k / kInt4TileDepth) * kInt4TileBytes;
        const Int4Place place = int4_place(row, static_cast<int>(k % kInt4TileDepth));
        uint32_t word;
        std::memcpy(&word, tile + place.word * 4, sizeof word);
        word |= value.nibble << place.shift;
        std::memcpy(tile + place.word * 4, &word, sizeof word);
        tile[int4_scale_place(row, static_cast<int>(k % kInt4TileDepth))] = value.scale;
      }
    }
  }
}

}  // namespace mixtral
