// One value of swiglu and of its gradient, for all CUDA kernels that compute them: the op and products with swiglu give
// the same bits.
#pragma once

#include "../cuda/division.cuh"
#include "../cuda/kernel.cuh"  // to_float, from_float

namespace mixtral::cuda {

// silu(gate) * up in f32, to be rounded to T.
template <typename T>
__device__ __forceinline__ float swiglu_product(float gate, float up) {
  const float divisor = 1.0f + expf(-gate);
  // An exact division costs a branch and as much as all the rest; 16-bit results keep at most 11 of its 24 bits.
  return (sizeof(T) == sizeof(float) ? gate / divisor : __fdividef(gate, divisor)) * up;
}

template <typename T>
__device__ __forceinline__ T swiglu_value(T gate, T up) {
  return from_float<T>(swiglu_product<T>(to_float(gate), to_float(up)));
}

template <typename T>
struct GateUp {
  T gate, up;
};

// The gradients of gate and up (swiglu_backward.h) in f32, rounded once.
template <typename T>
__device__ __forceinline__ GateUp<T> swiglu_gradient(float grad, T gate, T up) {
  const float g = to_float(gate), power = expf(-fabsf(g));  // at most 1, so that the divisor is between 1 and 2
  const float sigmoid = divide(g < 0.0f ? power : 1.0f, 1.0f + power);
  return {from_float<T>(grad * to_float(up) * sigmoid * (1.0f + g * (1.0f - sigmoid))),
          from_float<T>(grad * g * sigmoid)};
}

}  // namespace mixtral::cuda
