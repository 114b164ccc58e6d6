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

// All bytes before the data, which must follow in the order of `tensors`, without gaps.
std::string safetensors_header(const std::vector<StoredTensor>& tensors,
                               const std::map<std::string, std::string>& metadata = {});

}  // namespace mixtral
