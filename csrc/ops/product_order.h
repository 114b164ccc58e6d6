// The order in which matrix products read their right operand and add up their sums, on both devices.
//
// Panels hold 32 columns of the right operand: [depth / 32] steps of [32 depths x 32 columns]. A step of f32 or f16 is
// [32 depths][32 columns]. A step of bf16 and of int8 is in pair order, [2 halves][16 pairs][16 columns][2 depths]: the
// two values of a column at depths 2 p and 2 p + 1 lie side by side, as instructions on bf16 read them.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mixtral {

inline constexpr int64_t kPanelColumns = 32, kStepDepth = 32, kStepElements = kPanelColumns * kStepDepth;

// Products of f32 and f16 are added in chains of so many; the chains are then added up in order. Several short sums
// have a smaller error than one long one.
inline constexpr int64_t kChainDepth = 256;

// Where a step holds the value of column j at depth d: in pair order, and otherwise.
MIXTRAL_HOST_DEVICE constexpr int64_t pair_index(int64_t j, int64_t d) {
  return (j / 16 * 16 + d / 2) * 32 + j % 16 * 2 + d % 2;
}
MIXTRAL_HOST_DEVICE constexpr int64_t plain_index(int64_t j, int64_t d) { return d * kPanelColumns + j; }

}  // namespace mixtral
