// What kernels in headers are written with: number conversions, vectors, reductions, shared memory.
//
// In .cu files these are the functions of common.cuh. The GoogleTests run the same kernels on the CPU, with functions
// of the same names from the GPU emulator, tests/cpp/gpu_emulator/.
#pragma once

#ifdef __CUDACC__
#include "common.cuh"
#else
#include "gpu_emulator/hopper.h"
#endif

namespace mixtral::cuda {

// The start of a small kernel that launch_overlapping launches, before it reads or writes global memory: its blocks are
// on their multiprocessors when the kernel before ends, and those of the kernel behind when it ends itself.
//
// In this order: when a kernel starts, all but the one before it have ended, since that one waited for them. Where
// every kernel of a chain does so, a kernel may read ahead of its wait what the kernel before the last one wrote.
//
// Data that a kernel before wrote must not be read through a `const __restrict__` pointer: the compiler takes it for
// constant, and may move a load ahead of the wait or let it find stale values in the cache of read-only data.
__device__ __forceinline__ void start_behind_previous_kernel() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

}  // namespace mixtral::cuda
