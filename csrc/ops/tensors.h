// Tensors made inside an op. The functions of torch::stable look an ATen op up by name on every call; in decoding with
// a small model that costs more than many kernels.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"

namespace mixtral {

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Index tensors are accepted as int32 or int64; kernels see one type.
inline Tensor as_index(const Tensor& t, ScalarType type) {
  return as_contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type));
}

// Contiguous and uninitialised, on the device of `like`, and of its dtype if none is given.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype.value_or(like.scalar_type()))),
      like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace mixtral
