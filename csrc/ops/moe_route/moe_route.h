// moe_route: logits[t] = router x[t] in the router's dtype, then topk_softmax of them (Jiang et al., "Mixtral of
// Experts", 2024, eq. 2). An f32 router over bf16 activations is the selective precision of Fedus et al., "Switch
// Transformers" (2021), section 2.4. Sums are f32; with a bf16 or f16 router the logits are rounded to it.
//
// One kernel on either device: the logits of a block of tokens go straight into topk_softmax.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"

namespace mixtral {

inline constexpr int64_t kMaxRoutedExpertsCuda = 2048;  // a block's shared memory holds the logits of four tokens

// Tokens [begin, end) of x [T, H], router [E, H] -> weights [T, K], ids [T, K]. R, float or T, is the dtype of the
// router, whose values come in f32.
template <typename T, typename R>
void launch_moe_route_cpu(const T* x, const float* router, float* weights, int32_t* ids, int64_t hidden,
                          int64_t experts, int64_t top_k, bool renormalize, int64_t begin, int64_t end);

// x [T, H], router [E, H] -> weights [T, K], ids [T, K]. R is float or T.
template <typename T, typename R>
int launch_moe_route_cuda(const T* x, const R* router, float* weights, int32_t* ids, int64_t tokens, int64_t hidden,
                          int64_t experts, int64_t top_k, bool renormalize, cudaStream_t stream);

}  // namespace mixtral
