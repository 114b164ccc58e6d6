#include <limits>

#include "../cpu/simd.h"
#include "topk_softmax.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
MIXTRAL_INLINE RankedExpert ranked(const T* row, int64_t e) {
  const float logit = to_float(row[e]);
  return {logit != logit ? -kInfinity : logit, static_cast<int32_t>(e)};
}

// The first expert in rank order that comes after `previous`: no list of experts already chosen is needed.
template <typename T>
MIXTRAL_INLINE RankedExpert next_expert(const T* row, int64_t experts, RankedExpert previous) {
  RankedExpert best{-kInfinity, std::numeric_limits<int32_t>::max()};
  for (int64_t e = 0; e < experts; ++e) {
    const RankedExpert candidate = ranked(row, e);
    if (ranks_before(previous, candidate) && ranks_before(candidate, best)) best = candidate;
  }
  return best;
}

}  // namespace

template <typename T>
void launch_topk_softmax_cpu(const T* logits, float* weights, int32_t* ids, int64_t experts, int64_t top_k,
                             bool renormalize, int64_t begin, int64_t end) {
  for_cpu_isa([=] {
    for (int64_t t = begin; t < end; ++t) {
      const T* row = logits + t * experts;
      float* row_weights = weights + t * top_k;
      RankedExpert expert{kInfinity, -1};
      float max = 0.0f;
      double chosen = 0.0;
      for (int64_t k = 0; k < top_k; ++k) {
        expert = next_expert(row, experts, expert);
        if (k == 0) max = expert.logit;
        ids[t * top_k + k] = expert.id;
        row_weights[k] = exp_f32(expert.logit - max);
        chosen += row_weights[k];
      }
      // The sum over all experts also carries every NaN of the row into its weights.
      double total = 0.0;
      for (int64_t e = 0; e < experts; ++e) total += exp_f32(to_float(row[e]) - max);
      const double denominator = renormalize && total == total ? chosen : total;
      for (int64_t k = 0; k < top_k; ++k) row_weights[k] = static_cast<float>(row_weights[k] / denominator);
    }
  });
}

template void launch_topk_softmax_cpu(const float*, float*, int32_t*, int64_t, int64_t, bool, int64_t, int64_t);
template void launch_topk_softmax_cpu(const BFloat16*, float*, int32_t*, int64_t, int64_t, bool, int64_t, int64_t);
template void launch_topk_softmax_cpu(const Half*, float*, int32_t*, int64_t, int64_t, bool, int64_t, int64_t);

}  // namespace mixtral
