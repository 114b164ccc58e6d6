// The steps of a mixture-of-experts layer on arguments that were checked already. The public op of the same name is the
// checks and then the step; moe_mlp chains the steps without going through the dispatcher.
//
// `op` is the name that an error message shows: what can only be seen in the data (expert ids, offsets) is checked here,
// on the CPU, before anything is computed.
#pragma once

#include "../checks.h"
#include "../index_array.h"

namespace mixtral {

struct Permutation {
  Tensor permuted;  // [M, H]
  Tensor offs;      // [E] int32 end offsets
  Tensor row_map;   // [T, K] int32
};

// x [T, H], topk_ids [T, K]
Permutation moe_permute_step(const char* op, const Tensor& x, const Tensor& topk_ids, int64_t num_experts);

// y [M, H], topk_weights [T, K], row_map [T, K] -> [T, H]
Tensor moe_unpermute_step(const char* op, const Tensor& y, const Tensor& topk_weights, const Tensor& row_map);

// a [M, Kdim], b [E, N, Kdim], offs [E] -> [M, N]
Tensor grouped_gemm_step(const char* op, const Tensor& a, const Tensor& b, const Tensor& offs);

// gate_up [M, 2I] -> [M, I]
Tensor swiglu_step(const char* op, const Tensor& gate_up);

// `t` must be contiguous and outlive the array.
inline IndexArray index_array(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long}; }

}  // namespace mixtral
