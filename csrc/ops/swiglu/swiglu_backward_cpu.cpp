#include "../cpu/simd.h"
#include "swiglu_backward.h"
#include "swiglu_value.h"

namespace mixtral {

using namespace cpu;

template <typename T>
void launch_swiglu_backward_cpu(const T* grad, const T* gate_up, T* grad_gate_up, int64_t intermediate, int64_t begin,
                                int64_t end) {
  for_cpu_isa([=] {
    for (int64_t m = begin; m < end; ++m) {
      const T *upper = grad + m * intermediate, *gate = gate_up + m * 2 * intermediate, *up = gate + intermediate;
      T *grad_gate = grad_gate_up + m * 2 * intermediate, *grad_up = grad_gate + intermediate;
      for (int64_t i = 0; i < intermediate; ++i) {
        const GateUp value = swiglu_gradient(to_float(upper[i]), to_float(gate[i]), to_float(up[i]));
        grad_gate[i] = from_float<T>(value.gate);
        grad_up[i] = from_float<T>(value.up);
      }
    }
  });
}

template void launch_swiglu_backward_cpu(const float*, const float*, float*, int64_t, int64_t, int64_t);
template void launch_swiglu_backward_cpu(const BFloat16*, const BFloat16*, BFloat16*, int64_t, int64_t, int64_t);
template void launch_swiglu_backward_cpu(const Half*, const Half*, Half*, int64_t, int64_t, int64_t);

}  // namespace mixtral
