// What the CUDA kernels of attention share: rows of f32 in shared memory and products of their numbers, four at a time.
#pragma once

#include "../cuda/kernel.cuh"

namespace mixtral::cuda {

// Four floats of padding: rows start in different banks and stay 16-byte aligned.
constexpr int row_stride(int width) { return width + 4; }

// x [D] as f32 into shared memory [width], by one warp; zeros from D on or where there is no row.
template <int kWidth, typename T>
__device__ __forceinline__ void load_row(const T* x, int head_dim, float* out) {
  for (int d = threadIdx.x % kWarpSize; d < kWidth; d += kWarpSize) out[d] = x && d < head_dim ? to_float(x[d]) : 0.0f;
}

__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

__device__ __forceinline__ void add_scaled(float4& sum, float weight, float4 x) {
  sum = {fmaf(weight, x.x, sum.x), fmaf(weight, x.y, sum.y), fmaf(weight, x.z, sum.z), fmaf(weight, x.w, sum.w)};
}

}  // namespace mixtral::cuda
