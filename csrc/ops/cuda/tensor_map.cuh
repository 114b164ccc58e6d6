// Tensor maps: what TMA must know of a tensor in global memory to copy boxes of it.
//
// Source: CUDA driver API, cuTensorMapEncodeTiled. Encoding is a pure host computation of well under a microsecond on
// what is known from sizes and pointers alone, so it is legal under graph capture and done at every launch.
#pragma once

#include <array>

#include "hopper.cuh"

namespace mixtral::cuda {

enum class MapElement { kBFloat16, kByte };

// Sizes and box innermost first, strides in bytes for dimensions 1 and up; all boxes are swizzled rows of at most 128
// bytes. Returns false where the driver cannot describe it: base or strides not multiples of 16, a box above 256.
template <size_t kRank>
bool encode_tensor_map(TensorMap* map, const void* data, MapElement element, const std::array<int64_t, kRank>& sizes,
                       const std::array<int64_t, kRank - 1>& strides, const std::array<int, kRank>& box) {
  cuuint64_t driver_sizes[kRank], driver_strides[kRank] = {};
  cuuint32_t driver_box[kRank], steps[kRank];
  for (size_t d = 0; d < kRank; ++d) {
    driver_sizes[d] = static_cast<cuuint64_t>(sizes[d]);
    driver_box[d] = static_cast<cuuint32_t>(box[d]);
    steps[d] = 1;
    if (d > 0) driver_strides[d - 1] = static_cast<cuuint64_t>(strides[d - 1]);
  }
  const auto type = element == MapElement::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  // Through the runtime: nothing links the driver, which is missing where there is no GPU.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return encode && encode(map, type, kRank, const_cast<void*>(data), driver_sizes, driver_strides, driver_box, steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace mixtral::cuda
