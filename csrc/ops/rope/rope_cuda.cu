// One block per token: the angles once, into shared memory, then every head of q and k.
#include <algorithm>

#include "../cuda/common.cuh"
#include "rope.h"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int kThreads = 128;

// By value in the kernel's parameters: no copy to the device, no lifetime to look after.
struct InverseFrequencies {
  float value[kMaxRopePairsCuda];
};

// sincosf falls back to a slow path with local memory for large angles. Here angle / pi is taken in two doubles, so
// that its fraction is exact to f32 for every position below 2^53; sincospif needs no reduction then.
__device__ __forceinline__ void sine_cosine(float angle, float* sine, float* cosine) {
  constexpr double kInversePi = 0.31830988618379067154, kInversePiLow = -1.9678676675182486e-17;
  const double high = angle * kInversePi;
  const double low = fma(static_cast<double>(angle), kInversePi, -high) + angle * kInversePiLow;
  sincospif(static_cast<float>((high - 2.0 * rint(0.5 * high)) + low), sine, cosine);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rope_token_kernel(RopeTensor<T> q, RopeTensor<T> k, const int64_t* __restrict__ positions,
                      InverseFrequencies frequencies, int pairs, bool interleaved) {
  __shared__ float sine[kMaxRopePairsCuda], cosine[kMaxRopePairsCuda];
  const int64_t token = blockIdx.x;
  for (int i = threadIdx.x; i < pairs; i += kThreads)
    sine_cosine(__fmul_rn(static_cast<float>(positions[token]), frequencies.value[i]), &sine[i], &cosine[i]);
  __syncthreads();
  const int step = interleaved ? 2 : 1, partner = interleaved ? 1 : pairs;
  const int64_t heads = q.heads + k.heads;
  for (int64_t item = threadIdx.x; item < heads * pairs; item += kThreads) {
    const int64_t head = item / pairs;
    const int i = item % pairs;
    const bool is_q = head < q.heads;
    const int64_t offset = 2 * pairs * (is_q ? token * q.heads + head : token * k.heads + head - q.heads) + i * step;
    const T* x = (is_q ? q.x : k.x) + offset;
    T* out = (is_q ? q.out : k.out) + offset;
    const float a = to_float(x[0]), b = to_float(x[partner]);
    out[0] = from_float<T>(a * cosine[i] - b * sine[i]);
    out[partner] = from_float<T>(b * cosine[i] + a * sine[i]);
  }
}

}  // namespace

template <typename T>
int launch_rope_cuda(RopeTensor<T> q, RopeTensor<T> k, const int64_t* positions, const float* inverse_frequency,
                     int64_t tokens, int64_t head_dim, bool interleaved, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  InverseFrequencies frequencies{};
  std::copy_n(inverse_frequency, head_dim / 2, frequencies.value);
  rope_token_kernel<<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(
      q, k, positions, frequencies, static_cast<int>(head_dim / 2), interleaved);
  return cudaGetLastError();
}

template int launch_rope_cuda(RopeTensor<float>, RopeTensor<float>, const int64_t*, const float*, int64_t, int64_t,
                              bool, cudaStream_t);
template int launch_rope_cuda(RopeTensor<BFloat16>, RopeTensor<BFloat16>, const int64_t*, const float*, int64_t,
                              int64_t, bool, cudaStream_t);
template int launch_rope_cuda(RopeTensor<Half>, RopeTensor<Half>, const int64_t*, const float*, int64_t, int64_t, bool,
                              cudaStream_t);

}  // namespace mixtral
