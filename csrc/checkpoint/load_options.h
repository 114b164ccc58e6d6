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

// Where the weights of a model are, and how they get there.
enum class Weights {
  kRead,    // in memory of the process or on the device, read and packed at the start
  kDirect,  // as kRead, in large pieces past the memory of the system, which keeps no copy of the files
  kMmap,    // on the CPU, in the files, which are mapped: read when they are used, dropped when memory is short
};

// From "read", "direct" or "mmap". Throws std::invalid_argument for another name.
Weights parse_weights(const std::string& name);

struct LoadOptions {
  std::string device = "cpu";   // "cpu", "cuda" or "cuda:N"
  std::string dtype = "auto";   // as in parse_weight_type
  Progress progress = nullptr;  // in bytes
  bool pack = true;             // false: parameters have the shapes of model/parameters.h; slower on the CPU
  std::filesystem::path lora;   // an adapter to merge (lora.h): a folder, or a name as of find_model; empty: none
  bool check_weights = false;   // true: a value that is not finite is a LoadError
  Warn warn = nullptr;
  int64_t experts_per_token = 0;  // 0: as many as the checkpoint says
  Weights weights = Weights::kRead;
  bool mlock = false;      // keep the weights that the CPU reads in memory: the system never writes or drops them
  bool read_ahead = true;  // with kMmap: ask for the pages of experts as soon as they are chosen
  // Bytes on a device that is not the CPU for weights and activations, and not for the cache; experts beyond them stay
  // on the CPU (expert_offload.h). 0: all weights are on the device.
  int64_t gpu_memory = 0;
  bool simulate_gpu = false;  // with gpu_memory: memory of the CPU in the place of a GPU's, to test and to measure
  std::filesystem::path routing_counts;  // a file of read_expert_counts: which experts to keep there; empty: any
  Placement placement;                   // what this process holds: the whole model, unless it is one of several ranks
  std::shared_ptr<Communicator> world;   // all ranks; null for a single one
};

}  // namespace mixtral
