#include "../../cuda/launch.cuh"
#include "../../cuda/launch_counters.h"
#include "attention_decode_hopper.cuh"

namespace mixtral {
namespace {

static_assert(kMaxDecodeArrivals <= cuda::kLaunchCounters);

// The workspace has counters too, for when there are no others; they must be cleared first.
cudaError_t set_arrivals(const DecodeProblem& p, const DecodePlan& plan, DecodeWorkspace* workspace,
                         cudaStream_t stream) {
  if (plan.splits == 1) return cudaSuccess;
  int* counters = nullptr;
  if (const cudaError_t error = cuda::launch_counters(stream, &counters)) return error;
  if (!counters) return cudaMemsetAsync(workspace->arrivals, 0, decode_arrival_bytes(p, plan), stream);
  workspace->arrivals = counters;
  return cudaSuccess;
}

template <int kHeadDim>
int launch_head_dim(const DecodeProblem& p, void* memory, cudaStream_t stream) {
  const DecodePlan plan = decode_plan(p);
  DecodeWorkspace workspace = decode_workspace(p, plan, memory);
  constexpr int kBytes = sizeof(cuda::DecodeShared<kHeadDim>);
  const auto kernel = cuda::attention_decode_kernel<kHeadDim>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess) error = set_arrivals(p, plan, &workspace, stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(p.num_kv_heads),
                  static_cast<unsigned>(plan.splits));
  return cuda::launch_overlapping(kernel, grid, cuda::kDecodeThreads, kBytes, stream, p, plan, workspace);
}

}  // namespace

int launch_attention_decode_hopper(const DecodeProblem& p, void* workspace, cudaStream_t stream) {
  return p.head_dim == 64 ? launch_head_dim<64>(p, workspace, stream) : launch_head_dim<128>(p, workspace, stream);
}

}  // namespace mixtral
