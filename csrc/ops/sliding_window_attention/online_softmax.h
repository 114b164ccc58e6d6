// The online softmax of one row of scores (Milakov and Gimelshein, 2018), a block of keys at a time.
#pragma once

#include <limits>

#include "../cpu/simd.h"
#include "pack_keys.h"

namespace mixtral {

struct SoftmaxState {
  float max = -std::numeric_limits<float>::infinity();
  cpu::Lanes sum{};  // lane j: keys j (mod 16)
};

// scores, weights [64]; keys [from, to) are seen, the others get the weight 0. acc [width] is the weighted sum of
// values so far; it and the sum of weights are scaled when the maximum rises. The weights are summed as they are
// rounded for the product.
template <typename Operand>
MIXTRAL_INLINE void softmax_block(const float* scores, int64_t from, int64_t to, float scale, SoftmaxState& state,
                                  Operand* weights, float* acc, int64_t width) {
  using cpu::kLanes;
  static_assert(kKeyBlock == 4 * kLanes);
  constexpr float kUnseen = -std::numeric_limits<float>::infinity();
  float x[kKeyBlock];
  for (int64_t j = 0; j < kKeyBlock; ++j) x[j] = scores[j] * scale;
  for (int64_t j = 0; j < from; ++j) x[j] = kUnseen;
  for (int64_t j = to; j < kKeyBlock; ++j) x[j] = kUnseen;

  const auto larger = [](float a, float b) { return a > b ? a : b; };
  float top[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) top[j] = larger(larger(x[j], x[j + 16]), larger(x[j + 32], x[j + 48]));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) top[j] = larger(top[j], top[j + half]);
  const float max = larger(state.max, top[0]);

  for (int64_t j = 0; j < kKeyBlock; ++j) x[j] = cpu::exp_f32(x[j] - max);
  for (int64_t j = 0; j < kKeyBlock; ++j) weights[j] = cpu::from_float<Operand>(x[j]);
  for (int64_t j = 0; j < kKeyBlock; ++j) x[j] = cpu::to_float(weights[j]);
  if (max != state.max) {
    const float correction = cpu::exp_f32(state.max - max);
    for (int64_t j = 0; j < kLanes; ++j) state.sum.v[j] *= correction;
    for (int64_t d = 0; d < width; ++d) acc[d] *= correction;
    state.max = max;
  }
  for (int64_t j = 0; j < kLanes; ++j) state.sum.v[j] += (x[j] + x[j + 16]) + (x[j + 32] + x[j + 48]);
}

}  // namespace mixtral
