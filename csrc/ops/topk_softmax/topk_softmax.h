// topk_softmax: p[t, :] = softmax(router_logits[t, :]) in f32; the K largest in falling order, with their expert ids.
//   renormalize: weights[t, k] = p[t, ids[t, k]] / sum_k p[t, ids[t, k]], otherwise p[t, ids[t, k]] itself.
//
// Experts are ranked by their logits, which is the order of p without its rounding, so that all devices choose alike;
// of equal logits the smaller id comes first. A row that holds a NaN or +inf, or nothing but -inf, gets NaN weights and
// still distinct ids in [0, E).
#pragma once

#include <cstdint>

#include "../cuda/stream.h"
#include "../host_device.h"

namespace mixtral {

struct RankedExpert {
  float logit;
  int32_t id;
};

// The strict order of choice. NaN ranks as -inf: callers replace it first.
MIXTRAL_HOST_DEVICE inline bool ranks_before(RankedExpert a, RankedExpert b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// Rows [begin, end) of logits [T, E] -> weights [T, K], ids [T, K].
template <typename T>
void launch_topk_softmax_cpu(const T* logits, float* weights, int32_t* ids, int64_t experts, int64_t top_k,
                             bool renormalize, int64_t begin, int64_t end);

template <typename T>
int launch_topk_softmax_cuda(const T* logits, float* weights, int32_t* ids, int64_t tokens, int64_t experts,
                             int64_t top_k, bool renormalize, cudaStream_t stream);

}  // namespace mixtral
