#include <algorithm>
#include <limits>

#include "../cpu/buffer.h"
#include "../cpu/simd.h"
#include "topk_softmax.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
MIXTRAL_INLINE RankedExpert ranked(const T* scores, int64_t e) {
  const float score = to_float(scores[e]);
  return {score != score ? -kInfinity : score, static_cast<int32_t>(e)};
}

// The first expert in rank order that comes after `previous`: no list of experts already chosen is needed.
template <typename T>
MIXTRAL_INLINE RankedExpert next_expert(const T* scores, int64_t experts, RankedExpert previous) {
  RankedExpert best{-kInfinity, std::numeric_limits<int32_t>::max()};
  for (int64_t e = 0; e < experts; ++e) {
    const RankedExpert candidate = ranked(scores, e);
    if (ranks_before(previous, candidate) && ranks_before(candidate, best)) best = candidate;
  }
  return best;
}

template <typename T>
MIXTRAL_INLINE void choose(const T* scores, int32_t* ids, int64_t experts, int64_t top_k) {
  RankedExpert expert{kInfinity, -1};
  for (int64_t k = 0; k < top_k; ++k) {
    expert = next_expert(scores, experts, expert);
    ids[k] = expert.id;
  }
}

// The largest logit and the sum of exp(logit - max), which is NaN if any logit is.
template <typename T>
MIXTRAL_INLINE void softmax_terms(const T* row, int64_t experts, float& max, double& total) {
  max = -kInfinity;
  for (int64_t e = 0; e < experts; ++e) max = std::max(max, ranked(row, e).score);
  total = 0.0;
  for (int64_t e = 0; e < experts; ++e) total += exp_f32(to_float(row[e]) - max);
}

}  // namespace

template <typename T>
void launch_topk_softmax_cpu(const T* logits, const float* select_bias, float* weights, int32_t* ids, int64_t experts,
                             int64_t top_k, bool renormalize, int64_t begin, int64_t end) {
  thread_local Buffer<float> buffer;
  float* scores = select_bias ? buffer.grow(experts) : nullptr;  // [E]
  for_cpu_isa([=] {
    for (int64_t t = begin; t < end; ++t) {
      const T* row = logits + t * experts;
      float max;
      double total;
      softmax_terms(row, experts, max, total);
      int32_t* row_ids = ids + t * top_k;
      if (select_bias) {
        for (int64_t e = 0; e < experts; ++e)
          scores[e] = static_cast<float>(exp_f32(to_float(row[e]) - max) / total) + select_bias[e];
        choose(scores, row_ids, experts, top_k);
      } else {
        choose(row, row_ids, experts, top_k);
      }
      float* row_weights = weights + t * top_k;
      if (renormalize) {  // a bias may keep the largest logit from being chosen
        max = -kInfinity;
        for (int64_t k = 0; k < top_k; ++k) max = std::max(max, ranked(row, row_ids[k]).score);
      }
      double chosen = 0.0;
      for (int64_t k = 0; k < top_k; ++k) {
        row_weights[k] = exp_f32(ranked(row, row_ids[k]).score - max);
        chosen += row_weights[k];
      }
      // Every NaN of the row is in the total, and so in its weights.
      const double denominator = renormalize && total == total ? chosen : total;
      for (int64_t k = 0; k < top_k; ++k) row_weights[k] = static_cast<float>(row_weights[k] / denominator);
    }
  });
}

template <typename T>
void launch_topk_softmax_backward_cpu(const float* grad, const T* logits, const float* weights, IndexArray ids,
                                      T* grad_logits, int64_t experts, int64_t top_k, bool renormalize, int64_t begin,
                                      int64_t end) {
  thread_local Buffer<float> buffer;
  float* grads = buffer.grow(experts);  // [E] of a row: the gradient of its probabilities
  for_cpu_isa([=] {
    for (int64_t t = begin; t < end; ++t) {
      const float *g = grad + t * top_k, *w = weights + t * top_k;
      const T* row = logits + t * experts;
      T* out = grad_logits + t * experts;
      double mean = 0.0;
      for (int64_t k = 0; k < top_k; ++k) mean += static_cast<double>(g[k]) * w[k];
      if (renormalize) {
        std::fill_n(out, experts, from_float<T>(0.0f));
        for (int64_t k = 0; k < top_k; ++k)
          out[ids[t * top_k + k]] = from_float<T>(static_cast<float>(w[k] * (g[k] - mean)));
        continue;
      }
      std::fill_n(grads, experts, 0.0f);
      for (int64_t k = 0; k < top_k; ++k) grads[ids[t * top_k + k]] = g[k];
      float max;
      double total;
      softmax_terms(row, experts, max, total);
      for (int64_t e = 0; e < experts; ++e)
        out[e] = from_float<T>(static_cast<float>(exp_f32(to_float(row[e]) - max) / total * (grads[e] - mean)));
    }
  });
}

#define MIXTRAL_INSTANTIATE(T)                                                                                     \
  template void launch_topk_softmax_cpu(const T*, const float*, float*, int32_t*, int64_t, int64_t, bool, int64_t, \
                                        int64_t);                                                                  \
  template void launch_topk_softmax_backward_cpu(const float*, const T*, const float*, IndexArray, T*, int64_t,    \
                                                 int64_t, bool, int64_t, int64_t);
MIXTRAL_INSTANTIATE(float)
MIXTRAL_INSTANTIATE(BFloat16)
MIXTRAL_INSTANTIATE(Half)
#undef MIXTRAL_INSTANTIATE

}  // namespace mixtral
