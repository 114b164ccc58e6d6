#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "rolling_kv_cache.h"

namespace mixtral {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename T>
void launch_rolling_kv_cache_write_cpu(const T* k, const T* v, T* k_cache, T* v_cache, const int64_t* slot_mapping,
                                       int64_t row_size, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    std::copy_n(k + t * row_size, row_size, k_cache + slot_mapping[t] * row_size);
    std::copy_n(v + t * row_size, row_size, v_cache + slot_mapping[t] * row_size);
  }
}

template void launch_rolling_kv_cache_write_cpu(const float*, const float*, float*, float*, const int64_t*, int64_t,
                                                int64_t, int64_t);
template void launch_rolling_kv_cache_write_cpu(const BFloat16*, const BFloat16*, BFloat16*, BFloat16*, const int64_t*,
                                                int64_t, int64_t, int64_t);
template void launch_rolling_kv_cache_write_cpu(const Half*, const Half*, Half*, Half*, const int64_t*, int64_t,
                                                int64_t, int64_t);

}  // namespace mixtral
