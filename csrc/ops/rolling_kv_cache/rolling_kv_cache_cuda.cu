#include "../cuda/launch.cuh"
#include "rolling_kv_cache_kernels.cuh"

namespace mixtral {

using namespace cuda;

template <typename T>
int launch_rolling_kv_cache_write_cuda(const T* k, const T* v, T* k_cache, T* v_cache, const int64_t* slot_mapping,
                                       int64_t tokens, int64_t slots, int64_t row_size, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  return launch_overlapping(rolling_kv_cache_write_row_kernel<T>, dim3(static_cast<unsigned>(tokens)),
                            kCacheWriteThreads, 0, stream, k, v, k_cache, v_cache, slot_mapping, slots, row_size);
}

template <typename T>
int launch_rolling_kv_cache_rope_write_cuda(RopeWrite<T> write, const float* inverse_frequency, int64_t tokens,
                                            int64_t slots, int64_t head_dim, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const int pairs = static_cast<int>(head_dim / 2);
  return launch_overlapping(rolling_kv_cache_rope_write_token_kernel<T>, dim3(static_cast<unsigned>(tokens)),
                            kCacheRopeThreads, 0, stream, write, InverseFrequencies(inverse_frequency, pairs), slots,
                            pairs);
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
