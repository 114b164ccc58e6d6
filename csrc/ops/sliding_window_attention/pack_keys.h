// A block of keys and values as operands of the products of attention.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../cpu/simd.h"
#include "../cpu/transpose.h"
#include "block_products.h"

namespace mixtral {

// from [size] as operands, with zeros up to `width`.
template <typename T, typename Operand>
MIXTRAL_INLINE void convert_row(const T* from, int64_t size, int64_t width, Operand* to) {
  for (int64_t d = 0; d < size; ++d) to[d] = cpu::from_float<Operand>(cpu::to_float(from[d]));
  for (int64_t d = size; d < width; ++d) to[d] = Operand(0.0f);
}

// Whether no value of the row is infinite or NaN: by the largest bits without the sign.
template <typename T>
MIXTRAL_INLINE bool is_finite(const T* row, int64_t size) {
  using Bits = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;
  constexpr Bits kInfinity = std::is_same_v<T, float> ? 0x7f800000 : std::is_same_v<T, cpu::Half> ? 0x7c00 : 0x7f80;
  Bits largest = 0;
  for (int64_t d = 0; d < size; ++d) {
    Bits bits;
    std::memcpy(&bits, row + d, sizeof bits);
    largest = std::max<Bits>(largest, bits & std::numeric_limits<Bits>::max());
  }
  return largest < kInfinity;
}

// Where a panel of 32 keys holds the value of column j, or the pair of values of bf16, at depth d (product_order.h).
template <typename Stored>
constexpr int64_t panel_index(int64_t j, int64_t d) {
  return d / kStepDepth * kStepElements +
         (sizeof(Stored) == 2 ? pair_index(j, d % kStepDepth) : plain_index(j, d % kStepDepth));
}

// 32 keys of `width` values become the columns of a panel. Meanwhile some rows ahead are fetched.
template <typename Stored>
MIXTRAL_INLINE void pack_keys(const Stored* const* keys, RowsAhead& ahead, int64_t width, Stored* panel) {
  constexpr int64_t kWord = sizeof(uint32_t) / sizeof(Stored);  // values of a word
  // A transposition turns 16 words of 16 keys into a part of a panel. bf16: the half [16 pairs][16 columns][2] of a
  // step. f32: depths d to d + 15 of 16 of the 32 columns.
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t d = 0; d < width; d += 16 * kWord) {
      const void* words[16];
      for (int64_t j = 0; j < 16; ++j) words[j] = keys[16 * half + j] + d;
      ahead.fetch(2);
      cpu::transpose_words(words, panel + panel_index<Stored>(16 * half, d), kWord == 2 ? 16 : kPanelColumns);
    }
  }
}

// Columns d to d + 31 of 32 or 64 rows of values become a panel [keys/32][1024] in pair order, the depth being keys.
MIXTRAL_INLINE void pack_values(const cpu::BFloat16* const* values, RowsAhead& ahead, int64_t keys, int64_t d,
                                cpu::BFloat16* panel) {
  for (int64_t j = 0; j < keys; j += 2) {
    if (j % 4 == 0) ahead.fetch(1);
    for (int64_t half = 0; half < 2; ++half) {
      uint16_t even[16], odd[16];
      std::memcpy(even, values[j] + d + 16 * half, sizeof even);
      std::memcpy(odd, values[j + 1] + d + 16 * half, sizeof odd);
      uint32_t pairs[16];
      for (int64_t c = 0; c < 16; ++c) pairs[c] = even[c] | static_cast<uint32_t>(odd[c]) << 16;
      std::memcpy(panel + panel_index<cpu::BFloat16>(16 * half, j), pairs, sizeof pairs);
    }
  }
}

}  // namespace mixtral
