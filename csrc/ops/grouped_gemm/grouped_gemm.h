// grouped_gemm: out[m, n] = sum_k a[m, k] * b[e, n, k]  for the expert e with offs[e-1] <= m < offs[e]
//
// With weights of fp8, rows of a are first rounded to e4m3 too, so that tensor cores can multiply e4m3 by e4m3.
//
// offs holds the end of every group, as in torch's F.grouped_mm. Products and sums are f32, rounded once at the end. On
// CUDA, where the host does not read offs, rows after the last group are zero.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"
#include "../index_array.h"
#include "../pack_weight/pack_weight.h"

namespace mixtral {

// a [M, Kdim], b [E, N, Kdim] plain or packed, offs [E] end offsets, out [M, N]. The quantised formats of b are for
// a of BFloat16.
template <typename T>
struct GroupedGemm {
  const T* a;
  WeightView b;
  IndexArray offs;
  T* out;
  int64_t rows;  // M
};

class GemmWork;  // gemm_work.h

// The share of one of the threads that call this with the same work.
template <typename T>
void launch_grouped_gemm_cpu(const GroupedGemm<T>& gemm, GemmWork& work);

// The same followed by swiglu: b [E, 2I, Kdim], out [M, I]; the column blocks are those of I. The bits are those of the
// plain product followed by swiglu.
template <typename T>
void launch_grouped_gemm_swiglu_cpu(const GroupedGemm<T>& gemm, GemmWork& work);

// The gradient of b from that of out: for every expert, out[e, n, k] = sum over its rows m of grad[m, n] * a[m, k],
// from the first row on. The gradient of a needs no launcher of its own: it is the product of grad with b of the format
// kTransposed.
template <typename T>
struct GroupedGemmWeightGradient {
  const T* grad;  // [M, N]
  const T* a;     // [M, Kdim]
  IndexArray offs;
  T* out;                                 // [E, N, Kdim]
  int64_t rows, experts, columns, depth;  // M, E, N, Kdim
};

// The share of one of the threads that call this with the same work (GemmWork::of_depths).
template <typename T>
void launch_grouped_gemm_backward_weight_cpu(const GroupedGemmWeightGradient<T>& gradient, GemmWork& work);

// Rows [row_begin, row_end) of a [M, depth], rounded to e4m3 with a scale for each row (pack_weight/e4m3.h) -> out
// [M, depth]. A row with inf or NaN becomes NaN throughout.
void launch_round_to_e4m3_cpu(const BFloat16* a, int64_t depth, BFloat16* out, int64_t row_begin, int64_t row_end);

// The same on CUDA, of all rows of a [rows, depth]; returns a cudaError_t.
int launch_round_to_e4m3_cuda(const BFloat16* a, int64_t depth, BFloat16* out, int64_t rows, cudaStream_t stream);

// b is plain.
template <typename T>
int launch_grouped_gemm_cuda(const GroupedGemm<T>& gemm, cudaStream_t stream);

// The gradients on CUDA. b is of the format kTransposed; the gradient of rows after the last group is zero.
template <typename T>
int launch_grouped_gemm_backward_input_cuda(const GroupedGemm<T>& gemm, cudaStream_t stream);

template <typename T>
int launch_grouped_gemm_backward_weight_cuda(const GroupedGemmWeightGradient<T>& gradient, cudaStream_t stream);

}  // namespace mixtral
