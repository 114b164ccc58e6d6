// One block per token copies its row of k and of v into the cache; with rope it rotates q and k on the way.
#pragma once

#include "../rope/rope_token.cuh"
#include "rolling_kv_cache.h"

namespace mixtral::cuda {

inline constexpr int kCacheWriteThreads = 256;
inline constexpr int kCacheRopeThreads = 512;  // decoding has few tokens, and 40 heads of each to rotate

template <typename T>
__global__ void __launch_bounds__(kCacheWriteThreads)
    rolling_kv_cache_write_row_kernel(const T* k, const T* v, T* __restrict__ k_cache, T* __restrict__ v_cache,
                                      const int64_t* slot_mapping, int64_t slots, int64_t row_size) {
  start_behind_previous_kernel();
  const int64_t slot = slot_mapping[blockIdx.x];
  if (slot < 0 || slot >= slots) return;
  const int64_t source = static_cast<int64_t>(blockIdx.x) * row_size, target = slot * row_size;
  for (int64_t i = threadIdx.x; i < row_size; i += kCacheWriteThreads) {
    k_cache[target + i] = k[source + i];
    v_cache[target + i] = v[source + i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kCacheRopeThreads)
    rolling_kv_cache_rope_write_token_kernel(RopeWrite<T> write, InverseFrequencies frequencies, int64_t slots,
                                             int pairs) {
  start_behind_previous_kernel();
  __shared__ Rotation rotation;
  const auto& [q, k, v, v_stride, v_cache, positions, slot_mapping] = write;
  const int64_t token = blockIdx.x, slot = slot_mapping[token], row_size = k.heads * 2 * pairs;
  rotation.set_position(positions[token], frequencies, pairs);
  rotation.rotate(q.x + token * q.stride, q.out + token * q.heads * 2 * pairs, q.heads, pairs, /*interleaved=*/false);
  if (slot < 0 || slot >= slots) return;
  rotation.rotate(k.x + token * k.stride, k.out + slot * row_size, k.heads, pairs, /*interleaved=*/false);
  for (int64_t i = threadIdx.x; i < row_size; i += kCacheRopeThreads)
    v_cache[slot * row_size + i] = v[token * v_stride + i];
}

}  // namespace mixtral::cuda
