#include <climits>

#include "../cuda/launch.cuh"
#include "moe_permute.h"
#include "moe_permute_kernels.cuh"

namespace mixtral {
namespace {

using namespace cuda;

template <typename Word>
cudaError_t launch_chunks(const char* x, IndexArray ids, char* permuted, int32_t* offs, int32_t* row_map,
                          int64_t copies, int64_t top_k, int64_t experts, int64_t row_bytes, cudaStream_t stream) {
  const int64_t chunk = permute_chunk(copies), blocks = ceil_div(copies, chunk);
  return launch_overlapping(moe_permute_chunk_kernel<Word>, dim3(static_cast<unsigned>(blocks)), kPermuteThreads,
                            permute_shared_bytes(experts), stream, reinterpret_cast<const Word*>(x), ids,
                            reinterpret_cast<Word*>(permuted), offs, row_map, copies, top_k, experts, chunk,
                            row_bytes / static_cast<int64_t>(sizeof(Word)));
}

}  // namespace

int launch_moe_permute_cuda(const char* x, IndexArray ids, char* permuted, int32_t* offs, int32_t* row_map,
                            int64_t tokens, int64_t top_k, int64_t experts, int64_t row_bytes, cudaStream_t stream) {
  const int64_t copies = tokens * top_k;
  if (copies == 0) return cudaMemsetAsync(offs, 0, experts * sizeof(int32_t), stream);
  // `permuted` is a fresh allocation and aligned; x may be a view.
  const auto launch = vectors_fit<char, 16>(x, row_bytes) ? launch_chunks<uint4> : launch_chunks<char>;
  return launch(x, ids, permuted, offs, row_map, copies, top_k, experts, row_bytes, stream);
}

template <typename T>
int launch_moe_unpermute_cuda(const T* y, const float* weights, CopyRows rows, T* out, int64_t tokens, int64_t top_k,
                              int64_t hidden, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  constexpr int kValues = 16 / sizeof(T);
  const auto kernel =
      vectors_fit<T, kValues>(y, hidden) ? moe_unpermute_token_kernel<T, kValues> : moe_unpermute_token_kernel<T, 1>;
  return launch_overlapping(kernel, dim3(static_cast<unsigned>(tokens)), kPermuteThreads, 0, stream, y, weights, rows,
                            out, top_k, hidden);
}

template <typename T>
int launch_moe_unpermute_backward_cuda(const T* grad, const T* y, const float* weights, CopyRows rows, T* grad_y,
                                       float* grad_weights, int64_t tokens, int64_t top_k, int64_t hidden,
                                       cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  if (grad_y) {  // rows that no copy has get no gradient
    const auto error = cudaMemsetAsync(grad_y, 0, tokens * top_k * hidden * sizeof(T), stream);
    if (error != cudaSuccess) return error;
  }
  moe_unpermute_backward_token_kernel<<<static_cast<unsigned>(tokens), kPermuteThreads, 0, stream>>>(
      grad, y, weights, rows, grad_y, grad_weights, top_k, hidden);
  return cudaGetLastError();
}

#define MIXTRAL_INSTANTIATE(T)                                                                                     \
  template int launch_moe_unpermute_cuda(const T*, const float*, CopyRows, T*, int64_t, int64_t, int64_t,          \
                                         cudaStream_t);                                                            \
  template int launch_moe_unpermute_backward_cuda(const T*, const T*, const float*, CopyRows, T*, float*, int64_t, \
                                                  int64_t, int64_t, cudaStream_t);
MIXTRAL_INSTANTIATE(float)
MIXTRAL_INSTANTIATE(BFloat16)
MIXTRAL_INSTANTIATE(Half)
#undef MIXTRAL_INSTANTIATE

}  // namespace mixtral
