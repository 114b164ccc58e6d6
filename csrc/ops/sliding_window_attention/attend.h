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

// Arguments are checked; k and v contiguous, cu_seqlens_q int64 contiguous [B + 1]. Returns [T, Nq, D].
Tensor attend(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
              const KeyLayout& keys, int64_t window, bool causal, std::optional<double> scale);

}  // namespace mixtral
