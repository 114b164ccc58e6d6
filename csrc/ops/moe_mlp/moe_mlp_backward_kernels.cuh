// A block for each copy: the row of the copy is read once, in order, so that the sum over it has one order.
#pragma once

#include <cstdint>

#include "../cuda/kernel.cuh"  // to_float, from_float, block_sum
#include "../swiglu/swiglu_value.cuh"
#include "moe_mlp_backward.h"

namespace mixtral::cuda {

inline constexpr int kMoeBackwardThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kMoeBackwardThreads)
    moe_activation_backward_kernel(MoeActivationGradient<T> gradient) {
  const int64_t copy = blockIdx.x, row = gradient.row_map[copy], size = gradient.intermediate;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; row >= 0 && i < size; i += kMoeBackwardThreads) {
    const float weight = gradient.weights[copy];
    const int64_t gate = row * 2 * size + i, up = gate + size, at = row * size + i;
    if (gradient.grad_gate_up) {
      const GateUp<T> value =
          swiglu_gradient(weight * to_float(gradient.grad[at]), gradient.gate_up[gate], gradient.gate_up[up]);
      gradient.grad_gate_up[gate] = value.gate;
      gradient.grad_gate_up[up] = value.up;
    }
    if (!gradient.grad_weights && !gradient.weighted) continue;
    const T activated =
        gradient.activated ? gradient.activated[at] : swiglu_value(gradient.gate_up[gate], gradient.gate_up[up]);
    if (gradient.grad_weights) sum = fmaf(to_float(gradient.grad[at]), to_float(activated), sum);
    if (gradient.weighted) gradient.grad[at] = from_float<T>(weight * to_float(activated));
  }
  if (!gradient.grad_weights) return;
  const float total = block_sum(sum);
  if (threadIdx.x == 0) gradient.grad_weights[copy] = total;
}

}  // namespace mixtral::cuda
