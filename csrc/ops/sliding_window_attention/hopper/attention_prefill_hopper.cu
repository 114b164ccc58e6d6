// Launcher of attention_prefill_hopper.cuh: tensor maps and the grid.
#include <algorithm>

#include "../../cuda/launch_counters.h"
#include "attention_prefill_hopper.cuh"
#include "attention_prefill_hopper.h"

namespace mixtral {

int launch_attention_prefill_hopper(const AttentionProblem<BFloat16>& p, cudaStream_t stream) {
  using namespace cuda::prefill;
  using cuda::TensorMap;
  const PrefillPlan plan = prefill_plan(p.tokens, p.sequences, p.num_heads / p.num_kv_heads, p.num_kv_heads, p.keys);
  TensorMap q_map, k_map, v_map;
  if (!prefill_query_map(&q_map, p) || !prefill_key_map(&k_map, p, p.k) || !prefill_key_map(&v_map, p, p.v))
    return cudaErrorInvalidValue;
  const auto kernel = attention_prefill_hopper_kernel;
  int device = 0, processors = 0, *counters = nullptr;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cuda::launch_counters(stream, &counters);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(PrefillShared));
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(std::min(plan.items, processors));
  kernel<<<blocks, kPrefillThreads, sizeof(PrefillShared), stream>>>(p, plan, q_map, k_map, v_map, counters);
  return cudaGetLastError();
}

}  // namespace mixtral
