#include <climits>

#include "pack_weight.h"
#include "pack_weight_kernels.cuh"

namespace mixtral {
namespace {

using namespace cuda;

template <typename T, WeightFormat kFormat>
int unpack(const WeightView& weight, T* out, cudaStream_t stream) {
  const int64_t values = weight.experts * weight.columns * weight.depth;
  const int64_t grid = ceil_div(values, kUnpackValues * kUnpackThreads);
  if (grid == 0) return cudaSuccess;
  if (grid > INT_MAX) return cudaErrorInvalidConfiguration;
  unpack_weight_kernel<T, kFormat><<<static_cast<unsigned>(grid), kUnpackThreads, 0, stream>>>(
      static_cast<const char*>(weight.data), out, weight.experts * weight.columns / kBlockRows, weight.depth);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
int launch_unpack_weight_cuda(const WeightView& weight, T* out, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (weight.format == WeightFormat::kInt8) return unpack<T, WeightFormat::kInt8>(weight, out, stream);
    if (weight.format == WeightFormat::kFp8) return unpack<T, WeightFormat::kFp8>(weight, out, stream);
    if (weight.format == WeightFormat::kInt4) return unpack<T, WeightFormat::kInt4>(weight, out, stream);
  }
  return unpack<T, WeightFormat::kPacked>(weight, out, stream);
}

template int launch_unpack_weight_cuda(const WeightView&, float*, cudaStream_t);
template int launch_unpack_weight_cuda(const WeightView&, BFloat16*, cudaStream_t);
template int launch_unpack_weight_cuda(const WeightView&, Half*, cudaStream_t);

}  // namespace mixtral
