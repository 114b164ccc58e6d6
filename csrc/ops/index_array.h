// A read-only array of int32 or int64 indices. Kernels read either type, so no copy is converted, and a check sees the
// full 64 bits of a value.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mixtral {

struct IndexArray {
  const void* data;
  bool is_int64;

  MIXTRAL_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace mixtral
