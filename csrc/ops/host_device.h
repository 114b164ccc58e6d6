// What host code and CUDA kernels share: the macro for functions of both, and divisions that round up.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MIXTRAL_HOST_DEVICE __host__ __device__
#else
#define MIXTRAL_HOST_DEVICE
#endif

namespace mixtral {

// a / b, rounded up, for a >= 0 and b > 0.
MIXTRAL_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest multiple of `to` that is at least x.
MIXTRAL_HOST_DEVICE constexpr int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

}  // namespace mixtral
