// One thread per pair of a gate and a value; a grid row per row of the matrix.
#pragma once

#include <cstdint>

#include "swiglu_backward.h"
#include "swiglu_value.cuh"

namespace mixtral::cuda {

inline constexpr int kSwigluBackwardThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kSwigluBackwardThreads)
    swiglu_backward_elementwise_kernel(const T* __restrict__ grad, const T* __restrict__ gate_up,
                                       T* __restrict__ grad_gate_up, int64_t intermediate) {
  const int64_t row = blockIdx.x, stride = static_cast<int64_t>(gridDim.y) * kSwigluBackwardThreads;
  const int64_t gate = row * 2 * intermediate, up = gate + intermediate;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kSwigluBackwardThreads + threadIdx.x; i < intermediate;
       i += stride) {
    const float upper = to_float(grad[row * intermediate + i]);
    const GateUp<T> value = swiglu_gradient(upper, gate_up[gate + i], gate_up[up + i]);
    grad_gate_up[gate + i] = value.gate;
    grad_gate_up[up + i] = value.up;
  }
}

}  // namespace mixtral::cuda
