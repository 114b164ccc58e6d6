// Parameters that are views of the files of a checkpoint, for models that are larger than memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../model/packing.h"

namespace mixtral {

struct MappedWeights {
  ParameterMap parameters;           // those that are views; each keeps the mapping of its file
  std::vector<std::string> experts;  // of these, the weights [E, ...] of experts
  uint64_t bytes = 0;                // of `parameters`
  uint64_t read_bytes = 0;           // of the other parameters of the model
  std::string why_read;              // the first of those, and why; empty: there are none
  bool shows_residency = true;       // as of MappedFile, for all files
};

}  // namespace mixtral
