#include <climits>

#include "../host_device.h"
#include "grouped_gemm.h"
#include "round_to_e4m3_kernels.cuh"

namespace mixtral {

int launch_round_to_e4m3_cuda(const BFloat16* a, int64_t depth, BFloat16* out, int64_t rows, cudaStream_t stream) {
  const int64_t blocks = ceil_div(rows, cuda::kE4m3Warps);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  cuda::round_to_e4m3_kernel<<<static_cast<unsigned>(blocks), cuda::kE4m3Warps * cuda::kWarpSize, 0, stream>>>(
      a, out, rows, depth);
  return cudaGetLastError();
}

}  // namespace mixtral
