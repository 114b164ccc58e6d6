#include "sliding_window_attention_backward_kernels.cuh"

namespace mixtral {
namespace {

using namespace cuda;

template <typename T, int kWidth>
int launch_width(const AttentionBackwardProblem<T>& problem, cudaStream_t stream) {
  const AttentionProblem<T>& p = problem.forward;
  constexpr int kRows = backward_rows(kWidth), kThreads = backward_threads(kWidth);
  constexpr int kBytes = backward_shared_floats(kWidth) * static_cast<int>(sizeof(float));
  const dim3 queries(static_cast<unsigned>(num_query_tiles(p.tokens, p.sequences, kRows)),
                     static_cast<unsigned>(p.num_heads));
  const dim3 keys(static_cast<unsigned>(num_query_tiles(p.keys.page_size, p.sequences, kRows)),
                  static_cast<unsigned>(p.num_kv_heads));
  const auto of_queries = attention_backward_queries_kernel<T, kWidth>;
  const auto of_keys = attention_backward_keys_kernel<T, kWidth>;
  for (const auto kernel : {of_queries, of_keys}) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
  }
  if (p.tokens > 0 && p.num_heads > 0) of_queries<<<queries, kThreads, kBytes, stream>>>(problem);
  if (p.keys.page_size > 0) of_keys<<<keys, kThreads, kBytes, stream>>>(problem);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
int launch_attention_backward_cuda(const AttentionBackwardProblem<T>& problem, cudaStream_t stream) {
  if (problem.forward.sequences == 0) return cudaSuccess;
  if (problem.forward.head_dim <= 64) return launch_width<T, 64>(problem, stream);
  if (problem.forward.head_dim <= 128) return launch_width<T, 128>(problem, stream);
  static_assert(kMaxHeadDimCuda == 256);
  return launch_width<T, 256>(problem, stream);
}

template int launch_attention_backward_cuda(const AttentionBackwardProblem<float>&, cudaStream_t);
template int launch_attention_backward_cuda(const AttentionBackwardProblem<BFloat16>&, cudaStream_t);
template int launch_attention_backward_cuda(const AttentionBackwardProblem<Half>&, cudaStream_t);

}  // namespace mixtral
