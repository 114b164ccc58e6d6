// What LoadOptions::gpu_memory will put where, from the configuration alone: known before anything is loaded.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "expert_offload.h"
#include "memory_plan.h"

namespace mixtral {

struct OffloadPlan {
  double others = 0;            // bytes on the device: of weights beside the experts
  double activations = 0;       // and of activations, and a matrix that is unpacked
  double expert = 0;            // of one expert
  ExpertTable on_device;        // [L][E]: whether it is there. The CPU has them all
  bool by_counts = false;       // hits and misses are those of the routing counts; false: of even routing
  double hits = 0, misses = 0;  // of the choices of a token, in all layers: that find their expert there, or do not

  double staging() const { return 2 * expert; }  // on the device, and as much page-locked memory of the CPU
  int64_t num_experts() const;
  int64_t num_on_device() const;
  double on_device_bytes() const { return expert * static_cast<double>(num_on_device()); }
};

// device: "cpu" or "cuda"; gpu_memory in bytes; routing_counts: a file of read_expert_counts, or empty. Throws
// OutOfMemory when the memory does not hold what must be there, LoadError for a wrong file, and std::invalid_argument
// for a model without experts or counts of another model.
OffloadPlan plan_offload(const Config& config, const WeightType& type, const std::string& device, int64_t gpu_memory,
                         const std::filesystem::path& routing_counts = {});

}  // namespace mixtral
