#include <algorithm>
#include <cstring>

#include "../cpu/simd.h"
#include "moe_permute.h"

namespace mixtral {

using namespace cpu;

int64_t launch_moe_permute_index_cpu(IndexArray ids, int32_t* offs, int32_t* row_map, int64_t copies, int64_t experts) {
  for (int64_t i = 0; i < copies; ++i)
    if (ids[i] < -1 || ids[i] >= experts) return i;
  std::fill_n(offs, experts, 0);
  for (int64_t i = 0; i < copies; ++i)
    if (ids[i] >= 0) ++offs[ids[i]];
  int32_t start = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t count = offs[e];
    offs[e] = start;
    start += count;
  }
  // Each offset moves from the start of its expert to the end, one copy at a time.
  for (int64_t i = 0; i < copies; ++i) row_map[i] = ids[i] < 0 ? -1 : offs[ids[i]]++;
  return -1;
}

void launch_moe_permute_copy_cpu(const char* x, const int32_t* row_map, char* permuted, int64_t top_k,
                                 int64_t row_bytes, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t row = row_map[t * top_k + k];
      if (row >= 0) std::memcpy(permuted + row * row_bytes, x + t * row_bytes, row_bytes);
    }
}

template <typename T>
void launch_moe_unpermute_cpu(const T* y, const float* weights, CopyRows rows, T* out, int64_t top_k, int64_t hidden,
                              int64_t begin, int64_t end) {
  for_cpu_isa([=] {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < hidden; h += kLanes) {
        const int64_t n = std::min(kLanes, hidden - h);
        Lanes sum{};
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t row = rows[t * top_k + k];
          if (row < 0) continue;
          const T* value = y + row * hidden + h;
          const float weight = weights ? weights[t * top_k + k] : 1.0f;
          const Lanes lanes = n == kLanes ? load_lanes(value) : load_lanes(value, n);
          for (int64_t j = 0; j < kLanes; ++j) sum.v[j] = __builtin_fmaf(weight, lanes.v[j], sum.v[j]);
        }
        for (int64_t j = 0; j < n; ++j) out[t * hidden + h + j] = from_float<T>(sum.v[j]);
      }
    }
  });
}

template <typename T>
void launch_moe_unpermute_backward_cpu(const T* grad, const T* y, const float* weights, CopyRows rows, T* grad_y,
                                       float* grad_weights, int64_t top_k, int64_t hidden, int64_t begin, int64_t end) {
  for_cpu_isa([=] {
    for (int64_t i = begin * top_k; i < end * top_k; ++i) {
      const int64_t row = rows[i];
      if (grad_weights) grad_weights[i] = 0.0f;
      if (row < 0) continue;
      const T *token_grad = grad + i / top_k * hidden, *values = y + row * hidden;
      Lanes dot{};
      for (int64_t h = 0; h < hidden; h += kLanes) {
        const int64_t n = std::min(kLanes, hidden - h);
        const Lanes g = n == kLanes ? load_lanes(token_grad + h) : load_lanes(token_grad + h, n);
        if (grad_weights) fma_lanes(dot, g, n == kLanes ? load_lanes(values + h) : load_lanes(values + h, n));
        if (grad_y)
          for (int64_t j = 0; j < n; ++j) grad_y[row * hidden + h + j] = from_float<T>(weights[i] * g.v[j]);
      }
      if (grad_weights) grad_weights[i] = sum_lanes(dot);
    }
  });
}

#define MIXTRAL_INSTANTIATE(T)                                                                                      \
  template void launch_moe_unpermute_cpu(const T*, const float*, CopyRows, T*, int64_t, int64_t, int64_t, int64_t); \
  template void launch_moe_unpermute_backward_cpu(const T*, const T*, const float*, CopyRows, T*, float*, int64_t,  \
                                                  int64_t, int64_t, int64_t);
MIXTRAL_INSTANTIATE(float)
MIXTRAL_INSTANTIATE(BFloat16)
MIXTRAL_INSTANTIATE(Half)
#undef MIXTRAL_INSTANTIATE

}  // namespace mixtral
