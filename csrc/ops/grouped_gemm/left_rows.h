// Copies of the rows of the left operand of a product, in the order and type in which the micro-kernels read them.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../cpu/simd.h"
#include "../cpu/transpose.h"
#include "../host_device.h"
#include "../product_order.h"

namespace mixtral::cpu {

// Rows of a left operand. Row r holds at depth k the value data[r * stride + k], or data[k * stride + r] if transposed.
template <typename T>
struct LeftRows {
  const T* data;
  int64_t stride;
  bool transposed = false;

  LeftRows from_depth(int64_t k) const { return {data + (transposed ? k * stride : k), stride, transposed}; }
};

// Where a copy holds row r at depth k: row by row, or with kTiles in the order of tile_kernel(),
// [rows / 16][depth / 32][16][32]. `padded` is the depth of a row of the copy, a multiple of 32.
template <bool kTiles>
MIXTRAL_INLINE int64_t copy_index(int64_t r, int64_t k, int64_t padded) {
  if (!kTiles) return r * padded + k;
  return (r / 16 * padded + k / kStepDepth * kStepDepth) * 16 + r % 16 * kStepDepth + k % kStepDepth;
}

// `count` rows of `depth` -> out, each row in pieces of a step, followed by zeros: the micro-kernels multiply whole
// steps, and this memory still holds an earlier call's numbers.
template <bool kTiles, typename T, typename Operand>
MIXTRAL_INLINE void copy_straight(const LeftRows<T>& rows, int64_t count, int64_t depth, Operand* out) {
  const int64_t padded = round_up(depth, kStepDepth);
  const int64_t piece = kTiles ? kStepDepth : padded;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t k = 0; k < depth; k += piece) {
      const T* from = rows.data + r * rows.stride + k;
      Operand* to = out + copy_index<kTiles>(r, k, padded);
      const int64_t size = std::min(piece, depth - k);
      if constexpr (std::is_same_v<T, Operand>) {
        std::memcpy(static_cast<void*>(to), from, size * sizeof(T));
      } else {
        for (int64_t i = 0; i < size; ++i) to[i] = to_float(from[i]);
      }
      std::fill(to + size, to + piece, Operand(0.0f));
    }
  }
}

// Value `i` of the words of a transposed block that hold 32-bit values, or pairs of 16-bit ones.
template <typename T>
MIXTRAL_INLINE T word_part(uint32_t word, int64_t i) {
  T value;
  if constexpr (sizeof(T) == sizeof word) {
    std::memcpy(&value, &word, sizeof word);
  } else {
    value.x = static_cast<uint16_t>(word >> 16 * i);
  }
  return value;
}

template <typename Operand, typename T>
MIXTRAL_INLINE Operand as_operand(T x) {
  if constexpr (std::is_same_v<T, Operand>) {
    return x;
  } else {
    return to_float(x);
  }
}

// Sixteen depths of rows [r, r + 16) or, of 16-bit values, [r, r + 32), whose memory is contiguous over the rows. They
// are transposed as words of 32 bits: a word of 16-bit values holds those of two rows.
template <bool kTiles, typename T, typename Operand>
MIXTRAL_INLINE void copy_transposed_block(const LeftRows<T>& rows, int64_t r, int64_t count, int64_t k, int64_t depth,
                                          Operand* out) {
  constexpr int64_t kSide = 16, kParts = sizeof(uint32_t) / sizeof(T), kRows = kSide * kParts;
  const int64_t used = std::min(kRows, count - r);
  const bool inside = used == kRows && k + kSide <= depth;
  T edge[kSide][kRows];
  if (!inside) std::memset(static_cast<void*>(edge), 0, sizeof edge);
  const void* lines[kSide];
  for (int64_t i = 0; i < kSide; ++i) {
    const T* line = rows.data + (k + i) * rows.stride + r;
    if (!inside && k + i < depth) std::memcpy(static_cast<void*>(edge[i]), line, used * sizeof(T));
    lines[i] = inside ? line : edge[i];
  }
  uint32_t words[kSide][kSide];
  transpose_words(lines, words, kSide);
  for (int64_t i = 0; i < used; ++i) {
    Operand row[kSide];
    for (int64_t j = 0; j < kSide; ++j) row[j] = as_operand<Operand>(word_part<T>(words[i / kParts][j], i % kParts));
    Operand* to = out + copy_index<kTiles>(r + i, k, round_up(depth, kStepDepth));
    std::memcpy(static_cast<void*>(to), row, sizeof row);
  }
}

// The same for transposed rows.
template <bool kTiles, typename T, typename Operand>
MIXTRAL_INLINE void copy_transposed(const LeftRows<T>& rows, int64_t count, int64_t depth, Operand* out) {
  constexpr int64_t kRows = 64 / sizeof(T);
  for (int64_t k = 0; k < depth; k += kStepDepth)
    for (int64_t r = 0; r < count; r += kRows)
      for (int64_t half = 0; half < kStepDepth; half += kStepDepth / 2)
        copy_transposed_block<kTiles>(rows, r, count, k + half, depth, out);
}

// `count` rows of `depth` -> out [count, depth rounded up to 32], or in tiles with `count` rounded up to 32.
template <bool kTiles, typename T, typename Operand>
void copy_rows(const LeftRows<T>& rows, int64_t count, int64_t depth, Operand* out) {
  constexpr int64_t kTileGroup = 32;
  if (kTiles && count % kTileGroup > 0)
    std::memset(static_cast<void*>(out), 0,
                round_up(count, kTileGroup) * round_up(depth, kStepDepth) * sizeof(Operand));
  for_cpu_isa([&] {
    rows.transposed ? copy_transposed<kTiles>(rows, count, depth, out) : copy_straight<kTiles>(rows, count, depth, out);
  });
}

}  // namespace mixtral::cpu
