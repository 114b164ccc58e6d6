// The online softmax of rows of scores (Milakov and Gimelshein, 2018), a block of keys at a time.
#pragma once

#include <limits>

#include "../cpu/simd.h"
#include "attention_index.h"
#include "block_products.h"

namespace mixtral {

struct SoftmaxState {
  float max = -std::numeric_limits<float>::infinity();
  cpu::Lanes sum{};  // lane j: keys j (mod 16)
};

// Rows whose softmax is computed side by side: while one row waits for a result, others are computed.
inline constexpr int64_t kSoftmaxRows = 16;

// scores, weights [rows, 64], of up to kSoftmaxRows rows; row r sees the keys seen[r] of the block; other keys get the
// weight 0. acc [rows, width] is the weighted sum of values so far; it and the sum of weights are scaled where the
// maximum rises. The weights are summed as rounded for the product. The scores are overwritten.
template <typename Operand>
MIXTRAL_INLINE void softmax_block(float* scores, const KeyRange* seen, int64_t rows, float scale, SoftmaxState* states,
                                  Operand* weights, float* acc, int64_t width) {
  using cpu::kLanes;
  static_assert(kKeyBlock == 4 * kLanes);
  constexpr float kUnseen = -std::numeric_limits<float>::infinity();
  const auto larger = [](float a, float b) { return a > b ? a : b; };

  float top[kSoftmaxRows][kLanes];
  for (int64_t r = 0; r < rows; ++r) {
    float* x = scores + r * kKeyBlock;
    for (int64_t j = 0; j < kKeyBlock; ++j) x[j] *= scale;
    std::fill(x, x + seen[r].begin, kUnseen);
    std::fill(x + seen[r].end, x + kKeyBlock, kUnseen);
    for (int64_t j = 0; j < kLanes; ++j) top[r][j] = larger(larger(x[j], x[j + 16]), larger(x[j + 32], x[j + 48]));
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < half; ++j) top[r][j] = larger(top[r][j], top[r][j + half]);

  float max[kSoftmaxRows] = {}, correction[kSoftmaxRows] = {};
  for (int64_t r = 0; r < rows; ++r) {
    max[r] = larger(states[r].max, top[r][0]);
    correction[r] = states[r].max - max[r];
  }
  for (int64_t r = 0; r < kSoftmaxRows; ++r) correction[r] = cpu::exp_nonpositive(correction[r]);
  for (int64_t r = 0; r < rows; ++r) {
    if (max[r] == states[r].max) continue;
    for (int64_t j = 0; j < kLanes; ++j) states[r].sum.v[j] *= correction[r];
    for (int64_t d = 0; d < width; ++d) acc[r * width + d] *= correction[r];
    states[r].max = max[r];
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* x = scores + r * kKeyBlock;
    Operand* weight = weights + r * kKeyBlock;
    for (int64_t j = 0; j < kKeyBlock; ++j) x[j] = cpu::exp_nonpositive(x[j] - max[r]);
    for (int64_t j = 0; j < kKeyBlock; ++j) weight[j] = cpu::from_float<Operand>(x[j]);
    for (int64_t j = 0; j < kKeyBlock; ++j) x[j] = cpu::to_float(weight[j]);
    cpu::Lanes sum = states[r].sum;
    for (int64_t j = 0; j < kLanes; ++j) sum.v[j] += (x[j] + x[j + 16]) + (x[j + 32] + x[j + 48]);
    states[r].sum = sum;
  }
}

}  // namespace mixtral
