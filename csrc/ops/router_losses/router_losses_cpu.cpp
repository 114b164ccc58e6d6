#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../cpu/buffer.h"
#include "../cpu/simd.h"
#include "router_losses.h"

namespace mixtral {

using namespace cpu;

namespace {

// row [E] -> its softmax; returns log sum exp. All is NaN if a logit is NaN or +inf, or all are -inf.
template <typename T>
MIXTRAL_INLINE float softmax_row(const T* row, float* probabilities, int64_t experts) {
  float max = -std::numeric_limits<float>::infinity();
  for (int64_t e = 0; e < experts; ++e) max = std::max(max, to_float(row[e]));
  double total = 0.0;
  for (int64_t e = 0; e < experts; ++e) {
    probabilities[e] = exp_f32(to_float(row[e]) - max);
    total += probabilities[e];
  }
  for (int64_t e = 0; e < experts; ++e) probabilities[e] = static_cast<float>(probabilities[e] / total);
  return static_cast<float>(max + std::log(total));
}

}  // namespace

template <typename T>
void launch_router_probabilities_cpu(const T* logits, const bool* mask, float* probabilities, float* lse,
                                     int64_t experts, int64_t begin, int64_t end) {
  for_cpu_isa([=] {
    for (int64_t t = begin; t < end; ++t)
      if (!mask || mask[t]) lse[t] = softmax_row(logits + t * experts, probabilities + t * experts, experts);
  });
}

int64_t launch_router_sums_cpu(const float* probabilities, const float* lse, IndexArray ids, const bool* mask,
                               RouterSums sums, int64_t tokens, int64_t experts, int64_t top_k) {
  std::vector<double> prob_sum(experts);
  double z_sum = 0.0;
  int64_t count = 0;
  std::fill_n(sums.load, experts, int64_t{0});
  for (int64_t t = 0; t < tokens; ++t) {
    if (mask && !mask[t]) continue;
    for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
      if (ids[i] < 0 || ids[i] >= experts) return i;
      ++sums.load[ids[i]];
    }
    for (int64_t e = 0; e < experts; ++e) prob_sum[e] += probabilities[t * experts + e];
    z_sum += static_cast<double>(lse[t]) * lse[t];
    ++count;
  }
  for (int64_t e = 0; e < experts; ++e) sums.prob_sum[e] = static_cast<float>(prob_sum[e]);
  *sums.z_sum = static_cast<float>(z_sum);
  *sums.count = count;
  return -1;
}

template <typename T>
void launch_router_losses_backward_cpu(const float* grad_prob_sum, const float* grad_z_sum, const T* logits,
                                       const bool* mask, T* grad_logits, int64_t experts, int64_t begin, int64_t end) {
  thread_local Buffer<float> buffer;
  float* probabilities = buffer.grow(experts);  // [E]
  for_cpu_isa([=] {
    for (int64_t t = begin; t < end; ++t) {
      T* out = grad_logits + t * experts;
      if (mask && !mask[t]) {
        std::fill_n(out, experts, from_float<T>(0.0f));
        continue;
      }
      const float lse = softmax_row(logits + t * experts, probabilities, experts);
      double mean = 0.0;
      for (int64_t e = 0; e < experts; ++e) mean += static_cast<double>(grad_prob_sum[e]) * probabilities[e];
      const double z = 2.0 * *grad_z_sum * lse;
      for (int64_t e = 0; e < experts; ++e)
        out[e] = from_float<T>(static_cast<float>(probabilities[e] * (grad_prob_sum[e] - mean + z)));
    }
  });
}

#define MIXTRAL_INSTANTIATE(T)                                                                                     \
  template void launch_router_probabilities_cpu(const T*, const bool*, float*, float*, int64_t, int64_t, int64_t); \
  template void launch_router_losses_backward_cpu(const float*, const float*, const T*, const bool*, T*, int64_t,  \
                                                  int64_t, int64_t);
MIXTRAL_INSTANTIATE(float)
MIXTRAL_INSTANTIATE(BFloat16)
MIXTRAL_INSTANTIATE(Half)
#undef MIXTRAL_INSTANTIATE

}  // namespace mixtral
