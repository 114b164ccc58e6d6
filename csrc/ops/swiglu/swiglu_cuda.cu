// One thread per output value; a grid row per row of the matrix.
#include "../host_device.h"
#include "swiglu.h"
#include "swiglu_value.cuh"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    swiglu_elementwise_kernel(const T* __restrict__ gate_up, T* __restrict__ out, int64_t intermediate) {
  const int64_t row = blockIdx.x, stride = static_cast<int64_t>(gridDim.y) * kThreads;
  const T* gate = gate_up + row * 2 * intermediate;
  const T* up = gate + intermediate;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < intermediate; i += stride)
    out[row * intermediate + i] = swiglu_value(gate[i], up[i]);
}

}  // namespace

template <typename T>
int launch_swiglu_cuda(const T* gate_up, T* out, int64_t rows, int64_t intermediate, cudaStream_t stream) {
  if (rows == 0 || intermediate == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(intermediate, kThreads);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(blocks < kMaxGridY ? blocks : kMaxGridY));
  swiglu_elementwise_kernel<<<grid, kThreads, 0, stream>>>(gate_up, out, intermediate);
  return cudaGetLastError();
}

template int launch_swiglu_cuda(const float*, float*, int64_t, int64_t, cudaStream_t);
template int launch_swiglu_cuda(const BFloat16*, BFloat16*, int64_t, int64_t, cudaStream_t);
template int launch_swiglu_cuda(const Half*, Half*, int64_t, int64_t, cudaStream_t);

}  // namespace mixtral
