#include "../host_device.h"
#include "sliding_window_attention_kernels.cuh"

namespace mixtral {
namespace {

using namespace cuda;

template <typename T, int kWidth>
int launch_width(const AttentionProblem<T>& p, cudaStream_t stream) {
  const int64_t group = p.num_heads / p.num_kv_heads, tile_heads = heads_per_tile(group);
  const int64_t tile_tokens = kAttentionRows / tile_heads, head_tiles = ceil_div(group, tile_heads);
  const dim3 grid(static_cast<unsigned>(num_query_tiles(p.tokens, p.sequences, tile_tokens)),
                  static_cast<unsigned>(p.num_kv_heads * head_tiles));
  constexpr int kBytes = attention_shared_floats(kWidth) * static_cast<int>(sizeof(float));
  const auto kernel = attention_tile_kernel<T, kWidth>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kAttentionThreads, kBytes, stream>>>(p, static_cast<int>(tile_tokens));
  return cudaGetLastError();
}

}  // namespace

template <typename T>
int launch_attention_cuda(const AttentionProblem<T>& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.num_heads == 0) return cudaSuccess;
  if (p.head_dim <= 64) return launch_width<T, 64>(p, stream);
  if (p.head_dim <= 128) return launch_width<T, 128>(p, stream);
  static_assert(kMaxHeadDimCuda == 256);
  return launch_width<T, 256>(p, stream);
}

template int launch_attention_cuda(const AttentionProblem<float>&, cudaStream_t);
template int launch_attention_cuda(const AttentionProblem<BFloat16>&, cudaStream_t);
template int launch_attention_cuda(const AttentionProblem<Half>&, cudaStream_t);

}  // namespace mixtral
