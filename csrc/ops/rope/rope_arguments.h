// The host side that rope and rolling_kv_cache_rope_write share.
#pragma once

#include <vector>

#include "../checks.h"

namespace mixtral {

// q [T, Nq, D], k [T, Nkv, D], positions [T]: ranks, sizes, dtypes, devices; D even and within the CUDA kernels' limit.
void check_rope(const char* op, const Tensor& q, const Tensor& k, const Tensor& positions, double theta,
                const char* q_name = "q", const char* k_name = "k");

// [D/2], rounded to f32 after each operation, as torch computes 1.0 / theta ** (arange(0, D, 2) / D).
std::vector<float> inverse_frequencies(double theta, int64_t head_dim);

// The work of one token for parallel_rows: an angle costs about as much as 16 rotated pairs.
inline int64_t rope_work(int64_t heads, int64_t head_dim) { return (heads + 16) * head_dim; }

// x [T, heads, D], copied unless every token's row is contiguous: rows may lie apart, as in one projection of q, k and
// v.
Tensor as_rows(const Tensor& x);

}  // namespace mixtral
