// One token's rotation by one block, shared by the CUDA kernels.
#pragma once

#include <algorithm>

#include "../cuda/kernel.cuh"
#include "rope.h"

namespace mixtral::cuda {

// By value in the kernel's parameters: no copy to the device, no lifetime to look after.
struct InverseFrequencies {
  float value[kMaxRopePairsCuda];

  // inverse_frequency [pairs], in host memory
  InverseFrequencies(const float* inverse_frequency, int64_t pairs) : value{} {
    std::copy_n(inverse_frequency, pairs, value);
  }
};

// sincosf falls back to a slow path with local memory for large angles. Here angle / pi is computed in two
// doubles, so that its fraction is exact to f32 for every position below 2^53; sincospif then needs no reduction.
__device__ __forceinline__ void sine_cosine(float angle, float* sine, float* cosine) {
  constexpr double kInversePi = 0.31830988618379067154, kInversePiLow = -1.9678676675182486e-17;
  const double high = angle * kInversePi;
  const double low = fma(static_cast<double>(angle), kInversePi, -high) + angle * kInversePiLow;
  sincospif(static_cast<float>((high - 2.0 * rint(0.5 * high)) + low), sine, cosine);
}

// The cosine and sine of one token's angles, in shared memory.
struct Rotation {
  float sine[kMaxRopePairsCuda], cosine[kMaxRopePairsCuda];

  // Called by the whole block, which is synchronised when it returns.
  __device__ void set_position(int64_t position, const InverseFrequencies& frequencies, int pairs) {
    for (int i = threadIdx.x; i < pairs; i += blockDim.x)
      sine_cosine(__fmul_rn(static_cast<float>(position), frequencies.value[i]), &sine[i], &cosine[i]);
    __syncthreads();
  }

  // x, out [heads, 2 * pairs]. Each operation rounds for itself: the bits are the same in every kernel.
  template <typename T>
  __device__ void rotate(const T* __restrict__ x, T* __restrict__ out, int64_t heads, int pairs,
                         bool interleaved) const {
    const int stride = interleaved ? 2 : 1, partner = interleaved ? 1 : pairs;
    for (int64_t item = threadIdx.x; item < heads * pairs; item += blockDim.x) {
      const int i = item % pairs;
      const int64_t first = item / pairs * 2 * pairs + i * stride;
      const float a = to_float(x[first]), b = to_float(x[first + partner]);
      out[first] = from_float<T>(__fsub_rn(__fmul_rn(a, cosine[i]), __fmul_rn(b, sine[i])));
      out[first + partner] = from_float<T>(__fadd_rn(__fmul_rn(b, cosine[i]), __fmul_rn(a, sine[i])));
    }
  }
};

}  // namespace mixtral::cuda
