#include <cmath>

#include "moe_route_kernels.cuh"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int64_t kManyTokens = 1024;  // enough to fill a GPU with four in a block

}  // namespace

template <typename T, typename R>
int launch_moe_route_cuda(const T* x, const R* router, float* weights, int32_t* ids, int64_t tokens, int64_t hidden,
                          int64_t experts, int64_t top_k, bool renormalize, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const bool wide = vectors_fit<T, 4>(x, hidden) && vectors_fit<R, 4>(router, hidden);
  const bool many = tokens >= kManyTokens;
  const auto kernel = many   ? (wide ? moe_route_kernel<T, R, 4, 4> : moe_route_kernel<T, R, 4, 1>)
                      : wide ? moe_route_kernel<T, R, 1, 4>
                             : moe_route_kernel<T, R, 1, 1>;
  const int block_tokens = many ? 4 : 1;
  kernel<<<static_cast<unsigned>(ceil_div(tokens, block_tokens)), kRouteThreads,
           route_shared_bytes(block_tokens, experts), stream>>>(
      x, router, weights, ids, tokens, hidden, static_cast<int>(experts), static_cast<int>(top_k), renormalize);
  return cudaGetLastError();
}

template int launch_moe_route_cuda(const float*, const float*, float*, int32_t*, int64_t, int64_t, int64_t, int64_t,
                                   bool, cudaStream_t);
template int launch_moe_route_cuda(const BFloat16*, const float*, float*, int32_t*, int64_t, int64_t, int64_t, int64_t,
                                   bool, cudaStream_t);
template int launch_moe_route_cuda(const Half*, const float*, float*, int32_t*, int64_t, int64_t, int64_t, int64_t,
                                   bool, cudaStream_t);
template int launch_moe_route_cuda(const BFloat16*, const BFloat16*, float*, int32_t*, int64_t, int64_t, int64_t,
                                   int64_t, bool, cudaStream_t);
template int launch_moe_route_cuda(const Half*, const Half*, float*, int32_t*, int64_t, int64_t, int64_t, int64_t, bool,
                                   cudaStream_t);

}  // namespace mixtral
