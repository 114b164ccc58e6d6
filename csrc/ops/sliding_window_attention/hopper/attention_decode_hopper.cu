#include <map>
#include <mutex>
#include <utility>

#include "../../cuda/launch.cuh"
#include "attention_decode_hopper.cuh"

namespace mixtral {
namespace {

// Counters that no launch has to clear: they are 0 when the library is loaded, and the last block of a launch leaves
// them so. A launch that does not end leaves a CUDA context in which nothing can be launched any more.
constexpr int kArrivalSlots = 4096;
__device__ int arrival_slots[kArrivalSlots][kMaxDecodeArrivals];

// Launches that may run at once have a slot each: every stream has one, and so has every stream of a graph capture, for
// the graph may be replayed on any stream, beside others. A graph keeps its slots for the life of the process. null
// when there are none left.
cudaError_t arrivals_of(cudaStream_t stream, int** arrivals) {
  static std::mutex mutex;
  static std::map<std::pair<cudaStream_t, unsigned long long>, size_t> slots;  // by stream and capture, 0 for none
  cudaStreamCaptureStatus status;
  unsigned long long capture = 0;
  if (const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture)) return error;
  if (status != cudaStreamCaptureStatusActive) capture = 0;
  size_t slot = 0;
  {
    const std::lock_guard lock(mutex);
    const auto known = slots.find({stream, capture});
    slot = known != slots.end() ? known->second : slots.size();
    if (slot < kArrivalSlots) slots.emplace(std::pair(stream, capture), slot);
  }
  *arrivals = nullptr;
  if (slot == kArrivalSlots) return cudaSuccess;
  void* base = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&base, arrival_slots);  // of the current device
  *arrivals = static_cast<int*>(base) + slot * kMaxDecodeArrivals;
  return error;
}

// Without a slot, the workspace has counters too, to be cleared first.
cudaError_t set_arrivals(const DecodeProblem& p, const DecodePlan& plan, DecodeWorkspace* workspace,
                         cudaStream_t stream) {
  if (plan.splits == 1) return cudaSuccess;
  int* arrivals = nullptr;
  const cudaError_t error = arrivals_of(stream, &arrivals);
  if (error != cudaSuccess) return error;
  if (!arrivals) return cudaMemsetAsync(workspace->arrivals, 0, decode_arrival_bytes(p, plan), stream);
  workspace->arrivals = arrivals;
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
