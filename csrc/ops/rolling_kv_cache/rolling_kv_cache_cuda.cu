// One block per token copies its row of k and of v into the cache; with rope it rotates q and k on the way.
#include "../rope/rope_token.cuh"
#include "rolling_kv_cache.h"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kRopeThreads = 512;  // decoding has few tokens, and 40 heads of each to rotate

template <typename T>
__global__ void __launch_bounds__(kThreads)
    rolling_kv_cache_write_row_kernel(const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ k_cache,
                                      T* __restrict__ v_cache, const int64_t* __restrict__ slot_mapping, int64_t slots,
                                      int64_t row_size) {
  const int64_t slot = slot_mapping[blockIdx.x];
  if (slot < 0 || slot >= slots) return;
  const int64_t source = static_cast<int64_t>(blockIdx.x) * row_size, target = slot * row_size;
  for (int64_t i = threadIdx.x; i < row_size; i += kThreads) {
    k_cache[target + i] = k[source + i];
    v_cache[target + i] = v[source + i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kRopeThreads)
    rolling_kv_cache_rope_write_token_kernel(RopeWrite<T> write, InverseFrequencies frequencies, int64_t slots,
                                             int pairs) {
  __shared__ Rotation rotation;
  const auto& [q, k, v, v_stride, v_cache, positions, slot_mapping] = write;
  const int64_t token = blockIdx.x, slot = slot_mapping[token], row_size = k.heads * 2 * pairs;
  rotation.set_position(positions[token], frequencies, pairs);
  rotation.rotate(q.x + token * q.stride, q.out + token * q.heads * 2 * pairs, q.heads, pairs, /*interleaved=*/false);
  if (slot < 0 || slot >= slots) return;
  rotation.rotate(k.x + token * k.stride, k.out + slot * row_size, k.heads, pairs, /*interleaved=*/false);
  for (int64_t i = threadIdx.x; i < row_size; i += kRopeThreads) v_cache[slot * row_size + i] = v[token * v_stride + i];
}

}  // namespace

template <typename T>
int launch_rolling_kv_cache_write_cuda(const T* k, const T* v, T* k_cache, T* v_cache, const int64_t* slot_mapping,
                                       int64_t tokens, int64_t slots, int64_t row_size, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  rolling_kv_cache_write_row_kernel<<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(
      k, v, k_cache, v_cache, slot_mapping, slots, row_size);
  return cudaGetLastError();
}

template <typename T>
int launch_rolling_kv_cache_rope_write_cuda(RopeWrite<T> write, const float* inverse_frequency, int64_t tokens,
                                            int64_t slots, int64_t head_dim, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const int pairs = static_cast<int>(head_dim / 2);
  rolling_kv_cache_rope_write_token_kernel<<<static_cast<unsigned>(tokens), kRopeThreads, 0, stream>>>(
      write, InverseFrequencies(inverse_frequency, pairs), slots, pairs);
  return cudaGetLastError();
}

template int launch_rolling_kv_cache_write_cuda(const float*, const float*, float*, float*, const int64_t*, int64_t,
                                                int64_t, int64_t, cudaStream_t);
template int launch_rolling_kv_cache_write_cuda(const BFloat16*, const BFloat16*, BFloat16*, BFloat16*, const int64_t*,
                                                int64_t, int64_t, int64_t, cudaStream_t);
template int launch_rolling_kv_cache_write_cuda(const Half*, const Half*, Half*, Half*, const int64_t*, int64_t,
                                                int64_t, int64_t, cudaStream_t);
template int launch_rolling_kv_cache_rope_write_cuda(RopeWrite<float>, const float*, int64_t, int64_t, int64_t,
                                                     cudaStream_t);
template int launch_rolling_kv_cache_rope_write_cuda(RopeWrite<BFloat16>, const float*, int64_t, int64_t, int64_t,
                                                     cudaStream_t);
template int launch_rolling_kv_cache_rope_write_cuda(RopeWrite<Half>, const float*, int64_t, int64_t, int64_t,
                                                     cudaStream_t);

}  // namespace mixtral
