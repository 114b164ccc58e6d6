// One block per token: the angles once, into shared memory, then every head of q and k.
#include "rope_token.cuh"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rope_token_kernel(RopeTensor<T> q, RopeTensor<T> k, const int64_t* __restrict__ positions,
                      InverseFrequencies frequencies, int pairs, bool interleaved) {
  __shared__ Rotation rotation;
  const int64_t token = blockIdx.x;
  rotation.set_position(positions[token], frequencies, pairs);
  rotation.rotate(q.x + token * q.stride, q.out + token * q.heads * 2 * pairs, q.heads, pairs, interleaved);
  rotation.rotate(k.x + token * k.stride, k.out + token * k.heads * 2 * pairs, k.heads, pairs, interleaved);
}

}  // namespace

template <typename T>
int launch_rope_cuda(RopeTensor<T> q, RopeTensor<T> k, const int64_t* positions, const float* inverse_frequency,
                     int64_t tokens, int64_t head_dim, bool interleaved, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const int pairs = static_cast<int>(head_dim / 2);
  rope_token_kernel<<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(
      q, k, positions, InverseFrequencies(inverse_frequency, pairs), pairs, interleaved);
  return cudaGetLastError();
}

template int launch_rope_cuda(RopeTensor<float>, RopeTensor<float>, const int64_t*, const float*, int64_t, int64_t,
                              bool, cudaStream_t);
template int launch_rope_cuda(RopeTensor<BFloat16>, RopeTensor<BFloat16>, const int64_t*, const float*, int64_t,
                              int64_t, bool, cudaStream_t);
template int launch_rope_cuda(RopeTensor<Half>, RopeTensor<Half>, const int64_t*, const float*, int64_t, int64_t, bool,
                              cudaStream_t);

}  // namespace mixtral
