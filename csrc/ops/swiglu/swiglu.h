// swiglu: out[m, i] = silu(gate_up[m, i]) * gate_up[m, I + i],  silu(x) = x / (1 + exp(-x)); in f32, rounded once.
//
// Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"

namespace mixtral {

// Rows [begin, end) of gate_up [M, 2I] -> out [M, I].
template <typename T>
void launch_swiglu_cpu(const T* gate_up, T* out, int64_t intermediate, int64_t begin, int64_t end);

template <typename T>
int launch_swiglu_cuda(const T* gate_up, T* out, int64_t rows, int64_t intermediate, cudaStream_t stream);

}  // namespace mixtral
