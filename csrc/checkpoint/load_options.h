// How a checkpoint is read into a model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "../model/placement.h"

namespace mixtral {

class Communicator;

// Called during long work: units done, units in all. It may throw to end the work.
using Progress = std::function<void(uint64_t done, uint64_t total)>;

// Called with one line about something odd in a model's files that does not keep them from being used.
using Warn = std::function<void(const std::string& message)>;

struct LoadOptions {
  std::string device = "cpu";   // "cpu", "cuda" or "cuda:N"
  std::string dtype = "auto";   // as in parse_weight_type
  Progress progress = nullptr;  // in bytes
  bool pack = true;             // false: parameters have the shapes of model/parameters.h; slower on the CPU
  std::filesystem::path lora;   // an adapter to merge (lora.h): a folder, or a name as of find_model; empty: none
  bool check_weights = false;   // true: a value that is not finite is a LoadError
  Warn warn = nullptr;
  int64_t experts_per_token = 0;        // 0: as many as the checkpoint says
  Placement placement;                  // what this process holds: the whole model, unless it is one of several ranks
  std::shared_ptr<Communicator> world;  // all ranks; null for a single one
};

}  // namespace mixtral
