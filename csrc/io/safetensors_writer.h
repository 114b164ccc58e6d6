// The header of a safetensors file that is to be written (safetensors.h reads them). No torch in here.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace mixtral {

struct StoredTensor {
  std::string name, dtype;  // "F32", ...
  std::vector<int64_t> shape;
  uint64_t bytes = 0;
};

inline constexpr uint64_t kPageBytes = 4096;  // of files that are to be mapped

// All bytes before the data, which must follow in the order of `tensors`, without gaps. The data begins at a multiple
// of `alignment`.
std::string safetensors_header(const std::vector<StoredTensor>& tensors,
                               const std::map<std::string, std::string>& metadata = {}, uint64_t alignment = 8);

}  // namespace mixtral
