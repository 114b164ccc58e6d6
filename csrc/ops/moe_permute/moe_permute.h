// moe_permute:   sorts the M = T*K copies (token t, choice k) by expert, then by t, then by k (a stable counting sort):
//                permuted[row_map[t, k]] = x[t];  rows offs[e-1] .. offs[e] belong to expert e.
// moe_unpermute: out[t] = sum_k topk_weights[t, k] * y[row_map[t, k]], in f32, k in order, rounded once.
//
// moe_permute_backward:   grad_x[t] = sum_k grad[row_map[t, k]], the sum of moe_unpermute with weights of 1.
// moe_unpermute_backward: grad_y[row_map[t, k]] = topk_weights[t, k] * grad[t];
//                         grad_topk_weights[t, k] = <grad[t], y[row_map[t, k]]>, in f32: on the CPU 16 lanes, folded.
//
// No capacity limits the experts. A copy of expert -1 is dropped: row_map is -1, no offset counts it, and moe_unpermute
// skips it. The rows of `permuted` that are then unused, at the end, are zero, as are gradients of rows that no copy
// has, and those of dropped weights. Any other id outside [0, E) is an error on the CPU; on CUDA its copy is dropped.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"
#include "../index_array.h"

namespace mixtral {

// ids [copies], -1 for none -> offs [E], row_map [copies]. Returns the first copy with a bad id, having written
// nothing, or -1.
int64_t launch_moe_permute_index_cpu(IndexArray ids, int32_t* offs, int32_t* row_map, int64_t copies, int64_t experts);

// Tokens [begin, end) of x [T, row_bytes] -> permuted [M, row_bytes].
void launch_moe_permute_copy_cpu(const char* x, const int32_t* row_map, char* permuted, int64_t top_k,
                                 int64_t row_bytes, int64_t begin, int64_t end);

// Where the copies of tokens lie in y.
struct CopyRows {
  IndexArray index;  // [T, K]: row_map, or with `in_place` the expert ids
  int64_t bound;     // the index of a copy that was not dropped is in [0, bound)
  bool in_place;     // copy i is row i

  // The row of copy i, -1 if it was dropped.
  MIXTRAL_HOST_DEVICE int64_t operator[](int64_t i) const {
    const int64_t value = index[i];
    return value < 0 || value >= bound ? -1 : in_place ? i : value;
  }
};

// Tokens [begin, end) of out [T, H], from y [M, H] and weights [T, K]; null: all 1.
template <typename T>
void launch_moe_unpermute_cpu(const T* y, const float* weights, CopyRows rows, T* out, int64_t top_k, int64_t hidden,
                              int64_t begin, int64_t end);

// Tokens [begin, end) of grad [T, H], y [M, H], weights [T, K] -> rows of grad_y [M, H], grad_weights [T, K], each
// unless null.
template <typename T>
void launch_moe_unpermute_backward_cpu(const T* grad, const T* y, const float* weights, CopyRows rows, T* grad_y,
                                       float* grad_weights, int64_t top_k, int64_t hidden, int64_t begin, int64_t end);

inline constexpr int64_t kMaxExpertsCuda = 4096;  // a block's shared memory holds two counts of each

// x [T, row_bytes], ids [T, K] -> permuted [M, row_bytes], offs [E], row_map [T, K].
int launch_moe_permute_cuda(const char* x, IndexArray ids, char* permuted, int32_t* offs, int32_t* row_map,
                            int64_t tokens, int64_t top_k, int64_t experts, int64_t row_bytes, cudaStream_t stream);

template <typename T>
int launch_moe_unpermute_cuda(const T* y, const float* weights, CopyRows rows, T* out, int64_t tokens, int64_t top_k,
                              int64_t hidden, cudaStream_t stream);

template <typename T>
int launch_moe_unpermute_backward_cuda(const T* grad, const T* y, const float* weights, CopyRows rows, T* grad_y,
                                       float* grad_weights, int64_t tokens, int64_t top_k, int64_t hidden,
                                       cudaStream_t stream);

}  // namespace mixtral
