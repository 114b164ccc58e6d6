// Programmatic dependent launch: a kernel starts while the one before it in the stream ends, so that the blocks are
// there, with barriers and addresses made, when the data is. At a boundary between two small kernels that saves a
// microsecond or so. A graph keeps it: capture makes programmatic edges of such launches.
//
// Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_asked_for.h"
#include "memo.h"

namespace mixtral::cuda {

// Whether the code of `kernel` for the current device was compiled with griddepcontrol, which wants 9.0: code for 8.0
// would not wait, on a newer device either. And whether kernels for Hopper are asked for: without them, each kernel
// starts when the one before has ended.
inline bool can_overlap(const void* kernel) {
  int device = 0;
  if (!hopper_asked_for() || cudaGetDevice(&device) != cudaSuccess) return false;
  thread_local Memo<bool, 2, 256> known;
  bool can = false;
  known.get({reinterpret_cast<uint64_t>(kernel), static_cast<uint64_t>(device)}, &can, [kernel](bool* result) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;  // the launch will tell
    *result = attributes.ptxVersion >= 90;
    return true;
  });
  return can;
}

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...), which may start before the kernel before it in the
// stream has ended. Every block of `kernel` calls wait_for_previous_kernel(), in the threads that then read what
// earlier kernels wrote, and before it writes anything.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
                               cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = can_overlap(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace mixtral::cuda
