// Ops without their argument checks, for ops that are chains of others (moe_mlp). The public op of the same name checks
// its arguments and then calls the function here.
//
// Every result is rounded to the dtype of the input. Large results go into `out`, contiguous memory of the caller's
// choice. `op` is the name for error messages: on the CPU, expert ids and offsets are checked here, before the first
// write into `out`, since that takes a look at the data.
#pragma once

#include <optional>

#include "checks.h"
#include "index_array.h"
#include "pack_weight/weight_view.h"

namespace mixtral {

// `t` must be contiguous and outlive the array.
inline IndexArray index_array(const Tensor& t) { return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long}; }

namespace internal {

struct PermutationIndex {
  Tensor offs;     // [E] int32 end offsets
  Tensor row_map;  // [T, K] int32
  int64_t rows;    // of the copies that were kept; on CUDA, where the host does not know, of all
};

// x [T, H], topk_ids [T, K] -> out [M, H] and the index
PermutationIndex moe_permute(const char* op, const Tensor& x, const Tensor& topk_ids, int64_t num_experts,
                             const Tensor& out);

// Throws unless offs [experts], on the CPU, cuts `rows` of the argument `name` into groups.
void check_offsets(const char* op, const char* name, IndexArray offs, int64_t experts, int64_t rows);

// Packed -> plain [E, N, Kdim] of type `type`: BFloat16 when quantised, else that of the weight.
Tensor unpack_weight(const char* op, const Weight& weight, ScalarType type);

// a [M, Kdim], b [E, N, Kdim], offs [E] -> out [M, N]
void grouped_gemm(const char* op, const Tensor& a, const Weight& b, const Tensor& offs, const Tensor& out);

// a [M, Kdim], b [E, 2I, Kdim], offs [E] -> out [M, I]: the bits of grouped_gemm followed by swiglu, in one pass where
// the device has a kernel for that.
void grouped_gemm_swiglu(const char* op, const Tensor& a, const Weight& b, const Tensor& offs, const Tensor& out);

// gate_up [M, 2I] -> out [M, I]
void swiglu(const char* op, const Tensor& gate_up, const Tensor& out);

// Checks that topk_softmax and moe_route share. `reference` or `first` is the tensor whose device and T count.
void check_top_k(const char* op, int64_t top_k, int64_t experts);
std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& select_bias, int64_t experts,
                                   const Tensor& reference);
void check_choice(const char* op, const Tensor& grad, const Tensor& weights, const Tensor& topk_ids,
                  const Tensor& first);

// grad [T, K], logits [T, E] (values not read if renormalised), weights [T, K], topk_ids [T, K] -> [T, E] of the dtype
// of the logits
Tensor topk_softmax_backward(const char* op, const Tensor& grad, const Tensor& logits, const Tensor& weights,
                             const Tensor& topk_ids, bool renormalize);

// grad [M, N], b [E, N, Kdim], offs [E] -> out [M, Kdim]
void grouped_gemm_backward_input(const char* op, const Tensor& grad, const Weight& b, const Tensor& offs,
                                 const Tensor& out);

// grad [M, N], a [M, Kdim], offs [E] -> out [E, N, Kdim]
void grouped_gemm_backward_weight(const char* op, const Tensor& grad, const Tensor& a, const Tensor& offs,
                                  const Tensor& out);

// grad [M, H], row_map [T, K] -> [T, H], the sum over the copies of a token
Tensor moe_permute_backward(const char* op, const Tensor& grad, const Tensor& row_map);

// y [M, H], topk_weights [T, K], row_map [T, K] -> [T, H]
Tensor moe_unpermute(const char* op, const Tensor& y, const Tensor& topk_weights, const Tensor& row_map);

// The same for rows in the order of their tokens: copy k of token t is row t K + k of y. Copies whose expert in ids
// [T, K] is outside [0, E) are skipped.
Tensor moe_combine(const char* op, const Tensor& y, const Tensor& topk_weights, const Tensor& ids, int64_t num_experts);

}  // namespace internal
}  // namespace mixtral
