// Launcher of attention_prefill_hopper.cuh: tensor maps and the grid.
#include "attention_prefill_hopper.cuh"
#include "attention_prefill_hopper.h"

namespace mixtral {

int launch_attention_prefill_hopper(const AttentionProblem<BFloat16>& p, cudaStream_t stream) {
  using namespace cuda::prefill;
  using cuda::TensorMap;
  const int64_t group = p.num_heads / p.num_kv_heads, tokens = tile_tokens(group);
  TensorMap q_map, k_map, v_map;
  if (!prefill_query_map(&q_map, p) || !prefill_key_map(&k_map, p, p.k) || !prefill_key_map(&v_map, p, p.v))
    return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(num_query_tiles(p.tokens, p.sequences, tokens)),
                  static_cast<unsigned>(p.num_kv_heads));
  const auto kernel = attention_prefill_hopper_kernel;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(PrefillShared));
  if (error != cudaSuccess) return error;
  kernel<<<grid, kPrefillThreads, sizeof(PrefillShared), stream>>>(p, q_map, k_map, v_map);
  return cudaGetLastError();
}

}  // namespace mixtral
