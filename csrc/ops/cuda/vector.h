// Several neighbouring values as one load or store, and whether memory allows it.
#pragma once

#include <cstdint>

namespace mixtral::cuda {

template <typename T, int kValues>
struct alignas(sizeof(T) * kValues) Vector {
  T values[kValues];
};

// Rows of `row_values` values from `data` on can be read as vectors.
template <typename T, int kValues>
bool vectors_fit(const T* data, int64_t row_values) {
  return row_values % kValues == 0 && reinterpret_cast<uintptr_t>(data) % (sizeof(T) * kValues) == 0;
}

}  // namespace mixtral::cuda
