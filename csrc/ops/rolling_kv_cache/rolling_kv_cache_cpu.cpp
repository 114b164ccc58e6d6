#include <algorithm>

#include "../rope/rope_token_cpu.h"
#include "rolling_kv_cache.h"

namespace mixtral {

using namespace cpu;

template <typename T>
void launch_rolling_kv_cache_write_cpu(const T* k, const T* v, T* k_cache, T* v_cache, const int64_t* slot_mapping,
                                       int64_t row_size, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    std::copy_n(k + t * row_size, row_size, k_cache + slot_mapping[t] * row_size);
    std::copy_n(v + t * row_size, row_size, v_cache + slot_mapping[t] * row_size);
  }
}

template <typename T>
void launch_rolling_kv_cache_rope_write_cpu(RopeWrite<T> write, const float* inverse_frequency, int64_t head_dim,
                                            int64_t begin, int64_t end) {
  const auto& [q, k, v, v_stride, v_cache, positions, slot_mapping] = write;
  const int64_t row_size = k.heads * head_dim;
  Rotation rotation(inverse_frequency, head_dim);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t target = slot_mapping[t] * row_size;
    rotation.set_position(positions[t]);
    rotation.rotate(q.x + t * q.stride, q.out + t * q.heads * head_dim, q.heads, /*interleaved=*/false);
    rotation.rotate(k.x + t * k.stride, k.out + target, k.heads, /*interleaved=*/false);
    std::copy_n(v + t * v_stride, row_size, v_cache + target);
  }
}

template void launch_rolling_kv_cache_write_cpu(const float*, const float*, float*, float*, const int64_t*, int64_t,
                                                int64_t, int64_t);
template void launch_rolling_kv_cache_write_cpu(const BFloat16*, const BFloat16*, BFloat16*, BFloat16*, const int64_t*,
                                                int64_t, int64_t, int64_t);
template void launch_rolling_kv_cache_write_cpu(const Half*, const Half*, Half*, Half*, const int64_t*, int64_t,
                                                int64_t, int64_t);
template void launch_rolling_kv_cache_rope_write_cpu(RopeWrite<float>, const float*, int64_t, int64_t, int64_t);
template void launch_rolling_kv_cache_rope_write_cpu(RopeWrite<BFloat16>, const float*, int64_t, int64_t, int64_t);
template void launch_rolling_kv_cache_rope_write_cpu(RopeWrite<Half>, const float*, int64_t, int64_t, int64_t);

}  // namespace mixtral
