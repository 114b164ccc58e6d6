// The steps that ops chain: what moe_mlp is made of. The public op of the same name is the checks and
// then the step. Steps take arguments that were checked already and round their results to the dtype of their input.
// Large results go into `out`, contiguous memory of the caller's choice. `op` is the name for error messages: what only
// the data can show (expert ids, offsets) a step checks itself, on the CPU, before it writes into `out`.
#pragma once

#include <tuple>

#include "checks.h"
#include "index_array.h"

namespace mixtral {

struct PermutationIndex {
  Tensor offs;     // [E] int32 end offsets
  Tensor row_map;  // [T, K] int32
};

// x [T, H], topk_ids [T, K] -> out [M, H] and the index
PermutationIndex moe_permute_step(const char* op, const Tensor& x, const Tensor& topk_ids, int64_t num_experts,
                                  const Tensor& out);

// a [M, Kdim], b [E, N, Kdim] plain or packed, offs [E] -> out [M, N]
void grouped_gemm_step(const char* op, const char* b_name, const Tensor& a, const Tensor& b, const Tensor& offs,
                       const Tensor& out);

// Both steps, bit for bit, in one pass where the device has a kernel for it: a [M, Kdim], b [E, 2I, Kdim],
// offs [E] -> out [M, I]
void grouped_gemm_swiglu_step(const char* op, const char* b_name, const Tensor& a, const Tensor& b, const Tensor& offs,
                              const Tensor& out);

// The same two for rows that nobody sorted, on Hopper alone, where takes_routed_gemm_stream_hopper says yes: ids [R,
// C], contiguous, names the experts of each row of a [R, Kdim]; row r C + c of the result is that of row r and expert
// ids[r, c], and left unwritten if that is outside [0, E). `ids_ready`: as in RoutedRows, and b must be contiguous.
Tensor grouped_gemm_routed_step(const char* op, const char* b_name, const Tensor& a, const Tensor& b, const Tensor& ids,
                                bool ids_ready, bool swiglu);

// gate_up [M, 2I] -> [M, I]
Tensor swiglu_step(const char* op, const Tensor& gate_up);

// y [M, H], topk_weights [T, K], row_map [T, K] -> [T, H]
Tensor moe_unpermute_step(const char* op, const Tensor& y, const Tensor& topk_weights, const Tensor& row_map);

// The same where copy k of token t is row t K + k of y: those of ids [T, K] outside [0, E) are skipped.
Tensor moe_combine_step(const char* op, const Tensor& y, const Tensor& topk_weights, const Tensor& ids,
                        int64_t num_experts);

// logits [T, E] -> weights f32 [T, K], ids int32 [T, K]
std::tuple<Tensor, Tensor> topk_softmax_step(const char* op, const Tensor& router_logits, int64_t top_k,
                                             bool renormalize);

// `t` must be contiguous and outlive the array.
inline IndexArray index_array(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long}; }

}  // namespace mixtral
