// What `mixtral info --gpu-memory` says: what will be on the GPU and what on the CPU, and how fast it will decode.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "../checkpoint/offload_plan.h"
#include "../engine/offload_rates.h"
#include "flags.h"

namespace mixtral::app {

struct OffloadReport {
  OffloadPlan plan;
  OffloadRates rates;
  MemoryPlan memory;
  int64_t gpu_memory = 0;
  bool simulated = false;

  // Of a token; without a device of its misses alone.
  double decode_seconds() const { return rates.fixed + plan.hits * rates.hit + plan.misses * rates.miss; }
};

// Measures the rates, which takes some seconds. Throws what loading would: see plan_offload.
OffloadReport report_offload(const ModelFlags& flags, const Config& config, const WeightType& type,
                             const MemoryPlan& memory);
// Names and texts of rows.
std::vector<std::pair<std::string, std::string>> offload_rows(const OffloadReport& report);
nlohmann::json offload_json(const OffloadReport& report);

}  // namespace mixtral::app
