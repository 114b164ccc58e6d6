// One token's rotation, shared by the CPU kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../cpu/simd.h"

namespace mixtral::cpu {

// The cosine and sine of one token's angles, [D/2] each.
class Rotation {
 public:
  // inverse_frequency [D/2]
  Rotation(const float* inverse_frequency, int64_t head_dim)
      : inverse_frequency_(inverse_frequency), cosine_(head_dim / 2), sine_(head_dim / 2) {}

  void set_position(int64_t position) {
    for (size_t i = 0; i < cosine_.size(); ++i) {
      const float angle = static_cast<float>(position) * inverse_frequency_[i];
      cosine_[i] = std::cos(angle);
      sine_[i] = std::sin(angle);
    }
  }

  // x, out [heads, D]
  template <typename T>
  void rotate(const T* x, T* out, int64_t heads, bool interleaved) const {
    const int64_t pairs = static_cast<int64_t>(cosine_.size());
    const int64_t stride = interleaved ? 2 : 1, partner = interleaved ? 1 : pairs;
    const float *cosine = cosine_.data(), *sine = sine_.data();
    for (int64_t head = 0; head < heads; ++head, x += 2 * pairs, out += 2 * pairs) {
      for (int64_t i = 0; i < pairs; ++i) {
        const float a = to_float(x[i * stride]), b = to_float(x[i * stride + partner]);
        out[i * stride] = from_float<T>(a * cosine[i] - b * sine[i]);
        out[i * stride + partner] = from_float<T>(b * cosine[i] + a * sine[i]);
      }
    }
  }

 private:
  const float* inverse_frequency_;
  std::vector<float> cosine_, sine_;
};

}  // namespace mixtral::cpu
