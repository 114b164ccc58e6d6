// grouped_gemm: out[m, n] = sum_k a[m, k] * b[e, n, k]  for the expert e with offs[e-1] <= m < offs[e]
//
// offs holds the end of every group, as in torch's F.grouped_mm. Products and sums are f32, rounded once at the end. On
// CUDA, where offs is not read by the host, rows behind the last group are zero.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"
#include "../index_array.h"

namespace mixtral {

// Output tile of one unit of CPU work.
inline constexpr int64_t kGemmBlockRows = 64, kGemmBlockColumns = 48;

// a [M, Kdim], b [E, N, Kdim], offs [E] end offsets, out [M, N].
template <typename T>
struct GroupedGemm {
  const T* a;
  const T* b;
  IndexArray offs;
  T* out;
  int64_t experts, rows, columns, depth;  // E, M, N, Kdim
};

// Tiles [begin, end) in the numbering of tiles.h.
template <typename T>
void launch_grouped_gemm_cpu(const GroupedGemm<T>& gemm, int64_t begin, int64_t end);

template <typename T>
int launch_grouped_gemm_cuda(const GroupedGemm<T>& gemm, cudaStream_t stream);

}  // namespace mixtral
