// A block of keys and values as operands of the matrix products of attention: panels of 32 columns (../cpu/matmul.h).
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "../cpu/transpose.h"
#include "attention_index.h"

namespace mixtral {

inline constexpr int64_t kKeyBlock = 64;  // blocks start at multiples of it, in absolute positions

// The rows of a block, each of `width` operands.
template <typename Operand>
using BlockRows = const Operand* [kKeyBlock];

// from [size] as operands, with zeros up to `width`.
template <typename T, typename Operand>
MIXTRAL_INLINE void convert_row(const T* from, int64_t size, int64_t width, Operand* to) {
  for (int64_t d = 0; d < size; ++d) to[d] = cpu::from_float<Operand>(cpu::to_float(from[d]));
  for (int64_t d = size; d < width; ++d) to[d] = Operand(0.0f);
}

// One row of the tensor [size]: the row itself if it has the type and width of operands, else a copy.
template <typename T, typename Operand>
MIXTRAL_INLINE const Operand* operand_row(const T* row, int64_t size, int64_t width, Operand* copy) {
  if constexpr (std::is_same_v<T, Operand>)
    if (size == width) return row;
  convert_row(row, size, width, copy);
  return copy;
}

// Whether all of rows [from, to) is finite.
template <typename Operand>
MIXTRAL_INLINE bool rows_are_finite(const BlockRows<Operand>& rows, int64_t from, int64_t to, int64_t width) {
  using Bits = std::conditional_t<sizeof(Operand) == 2, uint16_t, uint32_t>;
  constexpr Bits kInfinity = static_cast<Bits>(0x7f800000u >> (32 - 8 * sizeof(Operand)));
  Bits largest = 0;
  for (int64_t j = from; j < to; ++j) {
    for (int64_t d = 0; d < width; ++d) {
      Bits bits;
      std::memcpy(&bits, rows[j] + d, sizeof bits);
      largest = std::max(largest, static_cast<Bits>(bits & static_cast<Bits>(~Bits{0} >> 1)));
    }
  }
  return largest < kInfinity;
}

// Keys become columns: panels [2][width/32][1024] for keys 0-31 and 32-63; only `panel_begin` to `panel_end`.
template <typename Operand>
MIXTRAL_INLINE void pack_keys(const BlockRows<Operand>& rows, int64_t panel_begin, int64_t panel_end, int64_t width,
                              Operand* panels) {
  constexpr int64_t kWord = sizeof(uint32_t) / sizeof(Operand);  // operands of a word
  // A transposition turns 16 words of 16 keys into a part of a panel. bf16: the half [16 pairs][16 columns][2] of a
  // step. f32: depths d to d + 15 of 16 of the 32 columns.
  constexpr int64_t kPairs = kWord == 2;
  for (int64_t half = 2 * panel_begin; half < 2 * panel_end; ++half) {
    for (int64_t d = 0; d < width; d += 16 * kWord) {
      const void* words[16];
      for (int64_t j = 0; j < 16; ++j) words[j] = rows[16 * half + j] + d;
      Operand* panel = panels + half / 2 * kPanelColumns * width + d * kPanelColumns;
      Operand* to = panel + half % 2 * (kPairs ? kStepElements / 2 : 16);
      cpu::transpose_words(words, to, kPairs ? 16 : kPanelColumns);
    }
  }
}

// Values stay rows: panels [width/32][2][1024], the depth being keys 0-63; only steps `step_begin` to `step_end`.
template <typename Operand>
MIXTRAL_INLINE void pack_values(const BlockRows<Operand>& rows, int64_t step_begin, int64_t step_end, int64_t width,
                                Operand* panels) {
  for (int64_t d = 0; d < width; d += kPanelColumns) {
    for (int64_t j = step_begin * kStepDepth; j < step_end * kStepDepth; ++j) {
      Operand* step = panels + d * kKeyBlock + j / kStepDepth * kStepElements;
      const int64_t row = j % kStepDepth;
      if constexpr (sizeof(Operand) == 4) {
        std::memcpy(step + row * kPanelColumns, rows[j] + d, kPanelColumns * sizeof(Operand));
      } else if (row % 2 == 0) {
        for (int64_t half = 0; half < 2; ++half) {
          uint16_t even[16], odd[16];
          std::memcpy(even, rows[j] + d + 16 * half, sizeof even);
          std::memcpy(odd, rows[j + 1] + d + 16 * half, sizeof odd);
          uint32_t pairs[16];
          for (int64_t c = 0; c < 16; ++c) pairs[c] = even[c] | static_cast<uint32_t>(odd[c]) << 16;
          std::memcpy(step + half * kStepElements / 2 + row * 16, pairs, sizeof pairs);
        }
      }
    }
  }
}

}  // namespace mixtral
