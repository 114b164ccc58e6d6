// With s = 1 / (1 + exp(-gate)), gate = gate_up[m, i] and up = gate_up[m, I + i], as in swiglu.h:
//   grad_gate_up[m, i]     = grad[m, i] up s (1 + gate (1 - s))
//   grad_gate_up[m, I + i] = grad[m, i] gate s
// in f32, rounded once. Differentiated from Shazeer (2020), eq. 6.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"

namespace mixtral {

// Rows [begin, end) of grad [M, I], gate_up [M, 2I] -> grad_gate_up [M, 2I].
template <typename T>
void launch_swiglu_backward_cpu(const T* grad, const T* gate_up, T* grad_gate_up, int64_t intermediate, int64_t begin,
                                int64_t end);

template <typename T>
int launch_swiglu_backward_cuda(const T* grad, const T* gate_up, T* grad_gate_up, int64_t rows, int64_t intermediate,
                                cudaStream_t stream);

}  // namespace mixtral
