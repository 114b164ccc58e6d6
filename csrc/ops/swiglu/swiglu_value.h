// The value and the gradient that the CPU kernels with a swiglu in them share.
#pragma once

#include "../cpu/simd.h"

namespace mixtral::cpu {

// silu(gate) * up in f32, rounded once.
template <typename T>
MIXTRAL_INLINE T swiglu_value(T gate, T up) {
  const float g = to_float(gate);
  return from_float<T>(g / (1.0f + exp_f32(-g)) * to_float(up));
}

struct GateUp {
  float gate, up;
};

// The gradients of gate and up (swiglu_backward.h), not rounded.
MIXTRAL_INLINE GateUp swiglu_gradient(float grad, float gate, float up) {
  const float sigmoid = 1.0f / (1.0f + exp_f32(-gate));
  return {grad * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)), grad * gate * sigmoid};
}

}  // namespace mixtral::cpu
