#include "attention_decode_hopper.cuh"

namespace mixtral {
namespace {

template <int kHeadDim>
int launch_head_dim(const DecodeProblem& p, void* memory, cudaStream_t stream) {
  const DecodePlan plan = decode_plan(p);
  const DecodeWorkspace workspace = decode_workspace(p, plan, memory);
  constexpr int kBytes = sizeof(cuda::DecodeShared<kHeadDim>);
  const auto kernel = cuda::attention_decode_kernel<kHeadDim>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess && plan.splits > 1)
    error = cudaMemsetAsync(workspace.arrivals, 0, decode_arrival_bytes(p, plan), stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(p.num_kv_heads),
                  static_cast<unsigned>(plan.splits));
  kernel<<<grid, cuda::kDecodeThreads, kBytes, stream>>>(p, plan, workspace);
  return cudaGetLastError();
}

}  // namespace

int launch_attention_decode_hopper(const DecodeProblem& p, void* workspace, cudaStream_t stream) {
  return p.head_dim == 64 ? launch_head_dim<64>(p, workspace, stream) : launch_head_dim<128>(p, workspace, stream);
}

}  // namespace mixtral
