#include "swiglu.h"
#include "swiglu_value.h"

namespace mixtral {

using namespace cpu;

template <typename T>
void launch_swiglu_cpu(const T* gate_up, T* out, int64_t intermediate, int64_t begin, int64_t end) {
  for_cpu_isa([=] {
    for (int64_t m = begin; m < end; ++m) {
      const T* gate = gate_up + m * 2 * intermediate;
      const T* up = gate + intermediate;
      for (int64_t i = 0; i < intermediate; ++i) out[m * intermediate + i] = swiglu_value(gate[i], up[i]);
    }
  });
}

template void launch_swiglu_cpu(const float*, float*, int64_t, int64_t, int64_t);
template void launch_swiglu_cpu(const BFloat16*, BFloat16*, int64_t, int64_t, int64_t);
template void launch_swiglu_cpu(const Half*, Half*, int64_t, int64_t, int64_t);

}  // namespace mixtral
