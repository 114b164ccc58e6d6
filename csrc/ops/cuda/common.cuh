// Helpers shared by the CUDA kernels: number conversion and reductions within a warp or a block. Kernels in headers
// include them through kernel.cuh.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "vector.h"

namespace mixtral::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

inline constexpr int kWarpSize = 32;

// The block's dynamic shared memory, aligned for the 128-byte swizzle.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_memory[];
  return dynamic_memory;
}

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}

// 1 / x to within one unit in the last place, for 2^-126 <= |x| <= 2^126.
__device__ __forceinline__ float reciprocal_estimate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Sum over the block, the same value in every thread. blockDim.x is a multiple of 32, at most 1024; all threads call
// it.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float partial[kWarpSize];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  x = warp_sum(x);
  __syncthreads();  // a previous call may still be reading `partial`
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

// griddepcontrol, from 9.0 on: the kernel before this one in the stream has finished and its writes are visible; the
// kernel behind it may start. Both do nothing in a launch without the attribute, and there is none for other code
// (launch_overlapping).
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace mixtral::cuda
