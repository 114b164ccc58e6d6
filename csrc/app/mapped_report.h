// What `mixtral info --weights mmap` says: what of a model will be in memory here, and how fast it will decode.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "../checkpoint/mapped_plan.h"

namespace mixtral::app {

struct MappedReport {
  MappedPlan plan;
  Bandwidths measured;
  double free = 0;  // bytes of memory
};

// Measures disk and memory, which takes a second or two.
MappedReport report_mapped(const std::filesystem::path& folder, const Config& config, const WeightType& type,
                           const MemoryPlan& memory);
// Names and texts of rows.
std::vector<std::pair<std::string, std::string>> mapped_rows(const MappedReport& report);
nlohmann::json mapped_json(const MappedReport& report);

}  // namespace mixtral::app
