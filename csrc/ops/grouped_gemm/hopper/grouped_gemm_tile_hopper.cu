// Launchers of the grouped products for Hopper.
#include <algorithm>

#include "grouped_gemm_tile_hopper.cuh"
#include "grouped_gemm_tile_hopper.h"

namespace mixtral {
namespace {

using namespace cuda;

template <bool kSwiglu>
int launch_tiles(const GroupedGemm<BFloat16>& gemm, cudaStream_t stream) {
  TensorMap a, b;
  if (!encode_gemm_maps(gemm, &a, &b)) return cudaErrorInvalidValue;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(grouped_gemm_tile_kernel<kSwiglu>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 sizeof(GemmShared));
  if (error != cudaSuccess) return error;
  const int64_t tiles = max_gemm_tiles(gemm.b.experts, gemm.rows, kGemmRows, ceil_div(gemm.b.columns, kGemmColumns));
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(tiles, processors));
  grouped_gemm_tile_kernel<kSwiglu><<<blocks, kGemmThreads, sizeof(GemmShared), stream>>>(a, b, gemm);
  return cudaGetLastError();
}

}  // namespace

int launch_grouped_gemm_tile_hopper(const GroupedGemm<BFloat16>& gemm, bool swiglu, cudaStream_t stream) {
  return swiglu ? launch_tiles<true>(gemm, stream) : launch_tiles<false>(gemm, stream);
}

}  // namespace mixtral
