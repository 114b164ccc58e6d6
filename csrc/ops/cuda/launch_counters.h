// Counters in device memory by which the blocks of a launch agree on something, without a memset before each launch.
#pragma once

#include <cuda_runtime_api.h>

namespace mixtral::cuda {

inline constexpr int kLaunchCounters = 264;

// *counters: kLaunchCounters of them on the current device, 0 before the first launch; every launch leaves them 0.
//
// Launches that may run at once have counters of their own: every stream has some, and so has every stream of a graph
// capture, for the graph may be replayed on any stream, beside others. A graph keeps them for the life of the process:
// when 4096 sets are given away, *counters is null. A launch that does not end leaves a CUDA context in which nothing
// can be launched any more.
cudaError_t launch_counters(cudaStream_t stream, int** counters);

}  // namespace mixtral::cuda
