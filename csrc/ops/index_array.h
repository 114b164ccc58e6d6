// A read-only index array of int32 or int64 values: kernels take either without a conversion copy, and no value is
// narrowed before it was checked.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MIXTRAL_HOST_DEVICE __host__ __device__
#else
#define MIXTRAL_HOST_DEVICE
#endif

namespace mixtral {

struct IndexArray {
  const void* data;
  bool is_int64;

  MIXTRAL_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace mixtral
