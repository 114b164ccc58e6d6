#include <climits>

#include "grouped_gemm_backward_kernels.cuh"

namespace mixtral {

using namespace cuda;

template <typename T>
int launch_grouped_gemm_backward_input_cuda(const GroupedGemm<T>& gemm, cudaStream_t stream) {
  const int64_t tiles =
      max_gemm_tiles(gemm.b.experts, gemm.rows, kBackwardTile, ceil_div(gemm.b.columns, kBackwardTile));
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT_MAX) return cudaErrorInvalidConfiguration;
  grouped_gemm_backward_input_kernel<<<static_cast<unsigned>(tiles), kBackwardThreads, kBackwardSharedBytes, stream>>>(
      gemm);
  return cudaGetLastError();
}

template <typename T>
int launch_grouped_gemm_backward_weight_cuda(const GroupedGemmWeightGradient<T>& gradient, cudaStream_t stream) {
  const int64_t tiles =
      gradient.experts * ceil_div(gradient.columns, kBackwardTile) * ceil_div(gradient.depth, kBackwardTile);
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT_MAX) return cudaErrorInvalidConfiguration;
  grouped_gemm_backward_weight_kernel<<<static_cast<unsigned>(tiles), kBackwardThreads, kBackwardSharedBytes, stream>>>(
      gradient);
  return cudaGetLastError();
}

template int launch_grouped_gemm_backward_input_cuda(const GroupedGemm<float>&, cudaStream_t);
template int launch_grouped_gemm_backward_input_cuda(const GroupedGemm<BFloat16>&, cudaStream_t);
template int launch_grouped_gemm_backward_input_cuda(const GroupedGemm<Half>&, cudaStream_t);
template int launch_grouped_gemm_backward_weight_cuda(const GroupedGemmWeightGradient<float>&, cudaStream_t);
template int launch_grouped_gemm_backward_weight_cuda(const GroupedGemmWeightGradient<BFloat16>&, cudaStream_t);
template int launch_grouped_gemm_backward_weight_cuda(const GroupedGemmWeightGradient<Half>&, cudaStream_t);

}  // namespace mixtral
