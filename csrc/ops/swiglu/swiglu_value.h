// The value that the CPU kernels with a swiglu in them share.
#pragma once

#include "../cpu/simd.h"

namespace mixtral::cpu {

// silu(gate) * up in f32, rounded once.
template <typename T>
MIXTRAL_INLINE T swiglu_value(T gate, T up) {
  const float g = to_float(gate);
  return from_float<T>(g / (1.0f + exp_f32(-g)) * to_float(up));
}

}  // namespace mixtral::cpu
