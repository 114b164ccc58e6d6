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

// The softmax of a block in three parts. scores [rows, 64], of up to kSoftmaxRows rows.

// Scales the scores; keys that a row does not see get -inf. top [rows] is the largest score of each.
template <typename Seen>
MIXTRAL_INLINE void scale_scores(float* scores, const Seen& seen, int64_t rows, float scale, float* top) {
  using cpu::kLanes;
  static_assert(kKeyBlock == 4 * kLanes);
  constexpr float kUnseen = -std::numeric_limits<float>::infinity();
  const auto larger = [](float a, float b) { return a > b ? a : b; };

  float lanes[kSoftmaxRows][kLanes];
  for (int64_t r = 0; r < rows; ++r) {
    float* x = scores + r * kKeyBlock;
    const KeyRange range = seen(r);
    for (int64_t j = 0; j < kKeyBlock; ++j) x[j] *= scale;
    std::fill(x, x + range.begin, kUnseen);
    std::fill(x + range.end, x + kKeyBlock, kUnseen);
    for (int64_t j = 0; j < kLanes; ++j) lanes[r][j] = larger(larger(x[j], x[j + 16]), larger(x[j + 32], x[j + 48]));
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < half; ++j) lanes[r][j] = larger(lanes[r][j], lanes[r][j + half]);
  for (int64_t r = 0; r < rows; ++r) top[r] = lanes[r][0];
}

// max [rows]: from the largest score of the block to the largest so far. Returns in correction [rows] by what the sums
// so far are multiplied: 1 where the maximum stays.
MIXTRAL_INLINE void raise_maxima(float* max, int64_t rows, SoftmaxState* states, float* correction) {
  for (int64_t r = 0; r < rows; ++r) {
    max[r] = states[r].max > max[r] ? states[r].max : max[r];
    correction[r] = states[r].max - max[r];
  }
  for (int64_t r = 0; r < rows; ++r) correction[r] = cpu::exp_nonpositive(correction[r]);
  for (int64_t r = 0; r < rows; ++r) {
    if (max[r] == states[r].max) correction[r] = 1.0f;
    states[r].max = max[r];
  }
}

// weights [rows, 64] = exp(scores - max), and their sums as rounded for the product. The scores are overwritten.
template <typename Operand>
MIXTRAL_INLINE void weigh_scores(float* scores, const float* max, int64_t rows, Operand* weights, cpu::Lanes* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    float* x = scores + r * kKeyBlock;
    Operand* weight = weights + r * kKeyBlock;
    for (int64_t j = 0; j < kKeyBlock; ++j) x[j] = cpu::exp_nonpositive(x[j] - max[r]);
    for (int64_t j = 0; j < kKeyBlock; ++j) weight[j] = cpu::from_float<Operand>(x[j]);
    for (int64_t j = 0; j < kKeyBlock; ++j) x[j] = cpu::to_float(weight[j]);
    cpu::Lanes sum;
    for (int64_t j = 0; j < cpu::kLanes; ++j) sum.v[j] = (x[j] + x[j + 16]) + (x[j + 32] + x[j + 48]);
    sums[r] = sum;
  }
}

// What a row has added up, acc [width] and the sum of weights, meets a block whose maximum is larger.
MIXTRAL_INLINE void correct(float correction, SoftmaxState& state, float* acc, int64_t width) {
  if (correction == 1.0f) return;
  for (int64_t j = 0; j < cpu::kLanes; ++j) state.sum.v[j] *= correction;
  for (int64_t d = 0; d < width; ++d) acc[d] *= correction;
}

MIXTRAL_INLINE void add_sum(SoftmaxState& state, const cpu::Lanes& sum) {
  for (int64_t j = 0; j < cpu::kLanes; ++j) state.sum.v[j] += sum.v[j];
}

// All of it: row r sees the keys seen(r) of the block; other keys get the weight 0. acc [rows, width] is the weighted
// sum of values so far.
template <typename Seen, typename Operand>
MIXTRAL_INLINE void softmax_block(float* scores, const Seen& seen, int64_t rows, float scale, SoftmaxState* states,
                                  Operand* weights, float* acc, int64_t width) {
  float max[kSoftmaxRows], correction[kSoftmaxRows];
  cpu::Lanes sums[kSoftmaxRows];
  scale_scores(scores, seen, rows, scale, max);
  raise_maxima(max, rows, states, correction);
  for (int64_t r = 0; r < rows; ++r) correct(correction[r], states[r], acc + r * width, width);
  weigh_scores(scores, max, rows, weights, sums);
  for (int64_t r = 0; r < rows; ++r) add_sum(states[r], sums[r]);
}

}  // namespace mixtral
