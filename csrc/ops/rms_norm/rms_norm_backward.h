// With n[t, h] = x[t, h] s[t] and s[t] = 1 / sqrt(mean_h(x[t, h]^2) + eps), as in rms_norm.h, and a = grad * weight:
//   grad_x[t, h]   = s[t] (a[t, h] - n[t, h] mean_j(a[t, j] n[t, j])) + grad_sum[t, h]
//   grad_weight[h] = sum_t grad[t, h] n[t, h]
// grad_sum is the gradient of the second result of add_rms_norm, whose norm is that of x + residual.
//
// Differentiated from Zhang and Sennrich (2019), eq. 4; the gradient takes the rounding of the normalised value as the
// identity. All of it is f32, rounded once. The rows of a weight's gradient are added in blocks of kNormRowBlock rows,
// in order, and the blocks in order.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"

namespace mixtral {

inline constexpr int64_t kNormRowBlock = 32;

// grad, x [T, H], weight [H].
template <typename T>
struct RmsNormBackward {
  const T* grad;
  const T* grad_sum;  // [T, H], or null: zero
  const T* x;
  const T* weight;
  T* grad_x;          // [T, H], or null: not wanted
  float* block_sums;  // [max(1, ceil(T / kNormRowBlock)), H] for the weight's gradient, or null: not wanted
  int64_t rows, hidden;
  float eps;
};

// Row blocks [begin, end): grad_x and block_sums. A call without rows has one empty block.
template <typename T>
void launch_rms_norm_backward_cpu(const RmsNormBackward<T>& norm, int64_t begin, int64_t end);

// Columns [begin, end): block_sums [blocks, H], which is overwritten, -> grad_weight [H].
template <typename T>
void launch_rms_norm_backward_sum_cpu(float* block_sums, T* grad_weight, int64_t blocks, int64_t hidden, int64_t begin,
                                      int64_t end);

// Everything. scales [T] f32 is memory for the kernel; grad_weight is null when block_sums is.
template <typename T>
int launch_rms_norm_backward_cuda(const RmsNormBackward<T>& norm, float* scales, T* grad_weight, cudaStream_t stream);

}  // namespace mixtral
