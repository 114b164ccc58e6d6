// The host side that sliding_window_attention and rolling_kv_cache_attention share.
#pragma once

#include <optional>

#include "../checks.h"
#include "attention_index.h"

namespace mixtral {

// q [T, Nq, D] against k, v [..., Nkv, D]: dtypes, devices, head counts.
void check_attention_tensors(const char* op, const Tensor& q, const char* k_name, const Tensor& k, const char* v_name,
                             const Tensor& v);

// cu_seqlens [B + 1] on the CPU: starts at 0, never falls, ends at `total`.
void check_cu_seqlens(const char* op, const char* name, const int64_t* cu_seqlens, int64_t sequences, int64_t total);

// The index tensors of sequences whose keys are packed, int64 and contiguous; `keys` points into cu_seqlens_k.
struct PackedSequences {
  Tensor cu_seqlens_q, cu_seqlens_k;
  KeyLayout keys;
};

// Checks the arguments that sliding_window_attention and its backward pass share.
PackedSequences packed_sequences(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t window, bool causal);

// The factor of the scores: 1 / sqrt(D) unless another is given.
float score_scale(std::optional<double> scale, int64_t head_dim);

// Arguments are checked; k and v contiguous, cu_seqlens_q int64 contiguous [B + 1]. Returns [T, Nq, D]; fills lse, f32
// [Nq, T], if it is given.
Tensor attend(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
              const KeyLayout& keys, int64_t window, bool causal, std::optional<double> scale,
              const Tensor* lse = nullptr);

}  // namespace mixtral
