// rms_norm:      out[t, h] = x[t, h] / sqrt(mean_h(x[t, h]^2) + eps) * weight[h]
// add_rms_norm:  sum = x + residual (rounded to the dtype), out = rms_norm(sum)
//
// Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4. The statistics are f32; as in Hugging
// Face's MixtralRMSNorm the normalised value is rounded to the dtype of x before the product with the weight.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"

namespace mixtral {

// Rows [begin, end) of x [T, H]. With a residual [T, H], `sum` [T, H] receives x + residual; otherwise both are null.
template <typename T>
void launch_rms_norm_cpu(const T* x, const T* residual, const T* weight, T* out, T* sum, int64_t hidden, float eps,
                         int64_t begin, int64_t end);

template <typename T>
int launch_rms_norm_cuda(const T* x, const T* residual, const T* weight, T* out, T* sum, int64_t rows, int64_t hidden,
                         float eps, cudaStream_t stream);

}  // namespace mixtral
