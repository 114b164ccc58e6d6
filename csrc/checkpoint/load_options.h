// How a checkpoint is read into a model.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace mixtral {

// Called during long work: units done, units in all. It may throw to end the work.
using Progress = std::function<void(uint64_t done, uint64_t total)>;

struct LoadOptions {
  std::string device = "cpu";   // "cpu", "cuda" or "cuda:N"
  std::string dtype = "auto";   // as in parse_weight_type
  Progress progress = nullptr;  // in bytes
  bool pack = true;             // false: parameters have the shapes of model/parameters.h; slower on the CPU
};

}  // namespace mixtral
