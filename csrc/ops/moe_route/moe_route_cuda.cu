#include <cmath>

#include "../cuda/launch.cuh"
#include "moe_route_kernels.cuh"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int64_t kManyTokens = 1024;  // enough to fill a GPU with four in a block

}  // namespace

template <typename T, typename R>
int launch_moe_route_cuda(const T* x, const R* router, const float* select_bias, RouteOutputs out, int64_t tokens,
                          int64_t hidden, int64_t experts, int64_t top_k, bool renormalize, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const bool wide = vectors_fit<T, 4>(x, hidden) && vectors_fit<R, 4>(router, hidden);
  const bool many = tokens >= kManyTokens;
  const auto kernel = many   ? (wide ? moe_route_kernel<T, R, 4, 4> : moe_route_kernel<T, R, 4, 1>)
                      : wide ? moe_route_kernel<T, R, 1, 4>
                             : moe_route_kernel<T, R, 1, 1>;
  const int block_tokens = many ? 4 : 1;
  return launch_overlapping(kernel, dim3(static_cast<unsigned>(ceil_div(tokens, block_tokens))), kRouteThreads,
                            route_shared_bytes(block_tokens, experts), stream, x, router, select_bias, out, tokens,
                            hidden, static_cast<int>(experts), static_cast<int>(top_k), renormalize);
}

template <typename T, typename R>
int launch_router_logits_backward_cuda(const float* grad, const T* x, const R* router, T* grad_x, R* grad_router,
                                       int64_t tokens, int64_t hidden, int64_t experts, cudaStream_t stream) {
  if (hidden == 0) return cudaSuccess;
  if (grad_x && tokens > 0) {
    const dim3 blocks(static_cast<unsigned>(tokens), static_cast<unsigned>(ceil_div(hidden, kRouteThreads)));
    router_logits_backward_x_kernel<<<blocks, kRouteThreads, 0, stream>>>(grad, router, grad_x, hidden,
                                                                          static_cast<int>(experts));
  }
  if (grad_router && experts > 0) {
    const dim3 blocks(static_cast<unsigned>(ceil_div(hidden, kWarpSize)),
                      static_cast<unsigned>(ceil_div(experts, kRouteExperts)));
    router_logits_backward_router_kernel<<<blocks, kRouteThreads, kRouterGradBytes, stream>>>(
        grad, x, grad_router, tokens, hidden, static_cast<int>(experts));
  }
  return cudaGetLastError();
}

#define MIXTRAL_INSTANTIATE(T, R)                                                                                      \
  template int launch_moe_route_cuda(const T*, const R*, const float*, RouteOutputs, int64_t, int64_t, int64_t,        \
                                     int64_t, bool, cudaStream_t);                                                     \
  template int launch_router_logits_backward_cuda(const float*, const T*, const R*, T*, R*, int64_t, int64_t, int64_t, \
                                                  cudaStream_t);
MIXTRAL_INSTANTIATE(float, float)
MIXTRAL_INSTANTIATE(BFloat16, float)
MIXTRAL_INSTANTIATE(Half, float)
MIXTRAL_INSTANTIATE(BFloat16, BFloat16)
MIXTRAL_INSTANTIATE(Half, Half)
#undef MIXTRAL_INSTANTIATE

}  // namespace mixtral
