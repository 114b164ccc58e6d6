#include "../cpu/buffer.h"
#include "../cpu/simd.h"
#include "../swiglu/swiglu_value.h"
#include "moe_mlp_backward.h"

namespace mixtral {

using namespace cpu;

namespace {

template <typename T>
MIXTRAL_INLINE float dot(const T* a, const T* b, int64_t size) {
  Lanes sum{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) fma_lanes(sum, load_lanes(a + i), load_lanes(b + i));
  if (i < size) fma_lanes(sum, load_lanes(a + i, size - i), load_lanes(b + i, size - i));
  return sum_lanes(sum);
}

// The row of copy `copy`; `scratch` [I] holds its activation where nobody kept it.
template <typename T>
MIXTRAL_INLINE void differentiate_row(const MoeActivationGradient<T>& g, int64_t copy, T* scratch) {
  const int64_t size = g.intermediate, row = g.row_map[copy];
  if (g.grad_weights) g.grad_weights[copy] = 0.0f;
  if (row < 0) return;  // dropped
  const float weight = g.weights[copy];
  const T *gate = g.gate_up + row * 2 * size, *up = gate + size;
  T* upper = g.grad + row * size;
  if (g.grad_gate_up) {
    T *grad_gate = g.grad_gate_up + row * 2 * size, *grad_up = grad_gate + size;
    for (int64_t i = 0; i < size; ++i) {
      const GateUp value = swiglu_gradient(weight * to_float(upper[i]), to_float(gate[i]), to_float(up[i]));
      grad_gate[i] = from_float<T>(value.gate);
      grad_up[i] = from_float<T>(value.up);
    }
  }
  if (!g.grad_weights && !g.weighted) return;
  const T* activated = g.activated ? g.activated + row * size : scratch;
  if (!g.activated)
    for (int64_t i = 0; i < size; ++i) scratch[i] = swiglu_value(gate[i], up[i]);
  if (g.grad_weights) g.grad_weights[copy] = dot(upper, activated, size);
  if (g.weighted)
    for (int64_t i = 0; i < size; ++i) upper[i] = from_float<T>(weight * to_float(activated[i]));
}

}  // namespace

template <typename T>
void launch_moe_activation_backward_cpu(const MoeActivationGradient<T>& gradient, int64_t begin, int64_t end) {
  thread_local Buffer<T> scratch;
  T* row = scratch.grow(gradient.intermediate);
  for_cpu_isa([=, &gradient] {
    for (int64_t copy = begin; copy < end; ++copy) differentiate_row(gradient, copy, row);
  });
}

template void launch_moe_activation_backward_cpu(const MoeActivationGradient<float>&, int64_t, int64_t);
template void launch_moe_activation_backward_cpu(const MoeActivationGradient<BFloat16>&, int64_t, int64_t);
template void launch_moe_activation_backward_cpu(const MoeActivationGradient<Half>&, int64_t, int64_t);

}  // namespace mixtral
