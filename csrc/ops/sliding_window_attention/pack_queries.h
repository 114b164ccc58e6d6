// A block of rows as operands of the products of attention's backward pass, and its softmax.
#pragma once

#include <cstring>

#include "../cpu/simd.h"
#include "../cpu/transpose.h"
#include "pack_keys.h"

namespace mixtral {

// Columns d to d + 31 of `count` rows become a panel, the depth being rows.
MIXTRAL_INLINE void pack_depth(const float* const* rows, int64_t count, int64_t d, float* panel) {
  for (int64_t j = 0; j < count; ++j)
    std::memcpy(panel + j * kPanelColumns, rows[j] + d, kPanelColumns * sizeof(float));
}

MIXTRAL_INLINE void pack_depth(const cpu::BFloat16* const* rows, int64_t count, int64_t d, cpu::BFloat16* panel) {
  RowsAhead none;
  pack_values(rows, none, count, d, panel);
}

// 64 rows of `width` values -> [width, 64]
MIXTRAL_INLINE void transpose(const float* const* rows, int64_t width, float* to) {
  for (int64_t j = 0; j < kKeyBlock; j += 16) {
    for (int64_t d = 0; d < width; d += 16) {
      const void* words[16];
      for (int64_t i = 0; i < 16; ++i) words[i] = rows[j + i] + d;
      cpu::transpose_words(words, to + d * kKeyBlock + j, kKeyBlock);
    }
  }
}

MIXTRAL_INLINE void transpose(const cpu::BFloat16* const* rows, int64_t width, cpu::BFloat16* to) {
  for (int64_t j = 0; j < kKeyBlock; j += 32) {
    for (int64_t d = 0; d < width; d += 16) {
      uint32_t pairs[16][16];  // of two neighbouring rows
      const void* words[16];
      for (int64_t i = 0; i < 16; ++i) {
        uint16_t even[16], odd[16];
        std::memcpy(even, rows[j + 2 * i] + d, sizeof even);
        std::memcpy(odd, rows[j + 2 * i + 1] + d, sizeof odd);
        for (int64_t c = 0; c < 16; ++c) pairs[i][c] = even[c] | static_cast<uint32_t>(odd[c]) << 16;
        words[i] = pairs[i];
      }
      cpu::transpose_words(words, to + d * kKeyBlock + j, kKeyBlock / 2);
    }
  }
}

// Weights P^T and gradients dS^T of the keys [begin, end) of a block, rows of stride `stride`, from their scores and
// dP^T [64, 32]. Query c sees the keys seen[c], counted from the first key of the block.
template <typename Operand>
MIXTRAL_INLINE void weights_and_gradients(const float* scores, const float* dp, int64_t begin, int64_t end,
                                          const int32_t (&seen)[2][kPanelColumns], float scale, const float* lse,
                                          const float* delta, int64_t stride, Operand* p, Operand* ds) {
  for (int64_t j = begin; j < end; ++j) {
    const float *score = scores + j * kPanelColumns, *slope = dp + j * kPanelColumns;
    const auto key = static_cast<int32_t>(j);
    float weight[kPanelColumns], gradient[kPanelColumns];
    for (int64_t c = 0; c < kPanelColumns; ++c)
      weight[c] = cpu::exp_nonpositive(__builtin_fmaf(score[c], scale, -lse[c]));
    for (int64_t c = 0; c < kPanelColumns; ++c) gradient[c] = weight[c] * (slope[c] - delta[c]);
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      const bool sees = (key >= seen[0][c]) & (key < seen[1][c]);
      weight[c] = sees ? weight[c] : 0.0f;
      gradient[c] = sees ? gradient[c] : 0.0f;
    }
    for (int64_t c = 0; c < kPanelColumns; ++c) p[j * stride + c] = cpu::from_float<Operand>(weight[c]);
    for (int64_t c = 0; c < kPanelColumns; ++c) ds[j * stride + c] = cpu::from_float<Operand>(gradient[c]);
  }
}

}  // namespace mixtral
