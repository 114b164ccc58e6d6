// Tensor maps: descriptions of tensors in global memory, which TMA needs to copy boxes of them.
//
// Source: CUDA driver API, cuTensorMapEncodeTiled: a pure host function of sizes and pointers, legal under graph
// capture. A launch needs up to seven maps, a pass through a model several hundred launches: a map is encoded once for
// its arguments and then looked up, in some 50 ns. Weights stay where they are, and the caching allocator gives out the
// same blocks again.
#pragma once

#include <algorithm>
#include <array>

#include "hopper.cuh"
#include "memo.h"

namespace mixtral::cuda {

enum class MapElement { kBFloat16, kByte };

// What the driver was asked for, innermost dimension first, and its answer.
struct NewTensorMap {
  int rank;
  const cuuint64_t *sizes, *strides;
  const cuuint32_t* box;
  CUresult answer;
};
inline void (*observe_new_tensor_map)(const NewTensorMap&) = nullptr;  // set by tests/cuda/tensor_maps.cu

// Sizes and box innermost first, strides in bytes for dimensions 1 and up.
template <size_t kRank>
bool encode_new_tensor_map(TensorMap* map, const void* data, MapElement element,
                           const std::array<int64_t, kRank>& sizes, const std::array<int64_t, kRank - 1>& strides,
                           const std::array<int, kRank>& box) {
  cuuint64_t driver_sizes[kRank], driver_strides[kRank] = {};
  cuuint32_t driver_box[kRank], element_strides[kRank];
  for (size_t d = 0; d < kRank; ++d) {
    driver_sizes[d] = static_cast<cuuint64_t>(sizes[d]);
    driver_box[d] = static_cast<cuuint32_t>(box[d]);
    element_strides[d] = 1;
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
  // The driver wants the device's context to be current. A thread that has only taken memory from the caching allocator
  // has none yet: setting the device, even to what it is, binds it, also while a graph is captured.
  int device = 0;
  CUresult answer = CUDA_ERROR_NOT_FOUND;
  if (encode && cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess)
    answer = encode(map, type, kRank, const_cast<void*>(data), driver_sizes, driver_strides, driver_box,
                    element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (observe_new_tensor_map) observe_new_tensor_map({kRank, driver_sizes, driver_strides, driver_box, answer});
  return answer == CUDA_SUCCESS;
}

// The same with a cache for each thread: up to 4096 maps of 128 bytes, enough for the weights of a model and its
// activations. All boxes are swizzled rows of at most 128 bytes. Returns false if the driver cannot describe the
// tensor: base or strides are not multiples of 16, or a box is above 256.
template <size_t kRank>
bool encode_tensor_map(TensorMap* map, const void* data, MapElement element, const std::array<int64_t, kRank>& sizes,
                       const std::array<int64_t, kRank - 1>& strides, const std::array<int, kRank>& box) {
  using Maps = Memo<TensorMap, 1 + 3 * kRank, 4096>;
  typename Maps::Key key{reinterpret_cast<uint64_t>(data), static_cast<uint64_t>(element)};
  std::copy(sizes.begin(), sizes.end(), key.begin() + 2);
  std::copy(strides.begin(), strides.end(), key.begin() + 2 + kRank);
  std::copy(box.begin(), box.end(), key.begin() + 1 + 2 * kRank);
  thread_local Maps maps;
  return maps.get(key, map,
                  [&](TensorMap* made) { return encode_new_tensor_map(made, data, element, sizes, strides, box); });
}

}  // namespace mixtral::cuda
