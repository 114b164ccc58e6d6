// From a run-time dtype and device to a typed kernel call.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "cpu/isa.h"
#include "cuda/stream.h"
#include "tensors.h"

namespace mixtral {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Calls f(T{}) with T = float, BFloat16 or Half; inside, `using T = decltype(tag)`.
template <typename F>
void dispatch_float(const char* op, ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      MIXTRAL_CHECK(false, op, ": dtype must be Float, BFloat16 or Half, got ", torch::headeronly::toString(type));
  }
}

template <typename T>
const T* const_ptr(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_ptr(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Runs kernel(begin, end) over rows [0, rows); one task is worth at least ~16k elementary operations.
template <typename F>
void parallel_rows(int64_t rows, int64_t work_per_row, const F& kernel) {
  if (rows == 0) return;
  cpu::cpu_isa();  // throws for a wrong MIXTRAL_CPU_ISA; parallel_for would lose the message
  constexpr int64_t kMinWork = 16384;
  const int64_t grain = std::max<int64_t>(1, kMinWork / std::max<int64_t>(1, work_per_row));
  torch::stable::parallel_for(0, rows, grain, kernel);
}

// Launchers are declared in both builds; `if constexpr (kWithCuda)` leaves no reference to them in a CPU-only one.
#ifdef MIXTRAL_WITH_CUDA
inline constexpr bool kWithCuda = true;
#else
inline constexpr bool kWithCuda = false;
#endif

// The device of a tensor made current, and its current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t);
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Launchers return a cudaError_t as int; only this layer throws.
void check_launch(const char* op, int error);

}  // namespace mixtral
