#include "mapped_report.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "../checkpoint/files.h"
#include "../engine/roofline.h"
#include "../io/disk_bandwidth.h"
#include "report.h"
#include "signals.h"

namespace mixtral::app {
namespace {

// 0 for a model whose weights are not here.
double bandwidth_of_files(const std::filesystem::path& folder, const Config& config) {
  std::string largest;
  uint64_t most = 0;
  try {
    for (const TensorFile& file : open_files(folder, config.layout)) {
      if (file.file().size() < most) continue;
      most = file.file().size();
      largest = file.path();
    }
  } catch (const LoadError&) {
    return 0;
  }
  return disk_bandwidth(largest);
}

std::string percent(double share) {
  char text[16];
  std::snprintf(text, sizeof text, "%.0f %%", 100 * share);
  return text;
}

std::string bandwidth_text(double bandwidth) { return bandwidth > 0 ? bytes_text(bandwidth) + "/s" : "not known"; }

}  // namespace

MappedReport report_mapped(const std::filesystem::path& folder, const Config& config, const WeightType& type,
                           const MemoryPlan& memory) {
  MappedReport report;
  report.free = static_cast<double>(available_memory("cpu"));
  report.measured.disk = bandwidth_of_files(folder, config);
  report.measured.products =
      product_bandwidth(config, type, std::min(memory.weights, report.free / 2), throw_if_terminated);
  report.plan = plan_mapped(config, type, memory, report.free, report.measured);
  return report;
}

std::vector<std::pair<std::string, std::string>> mapped_rows(const MappedReport& report) {
  const MappedPlan& plan = report.plan;
  char speed[64] = "not known";
  if (plan.tokens_per_second > 0) std::snprintf(speed, sizeof speed, "%.3g tokens/s", plan.tokens_per_second);
  return {{"mapped", bytes_text(plan.mapped) + " of files; a token reads " + bytes_text(plan.always) + " and " +
                         bytes_text(plan.experts_per_token) + " of experts"},
          {"in memory", percent(plan.resident_share) + " of " + bytes_text(plan.experts) + " of experts, with " +
                            bytes_text(report.free) + " free"},
          {"decode", std::string(speed) + " (disk " + bandwidth_text(report.measured.disk) + ", products " +
                         bandwidth_text(report.measured.products) + ")"}};
}

nlohmann::json mapped_json(const MappedReport& report) {
  const auto known = [](double value) { return value > 0 ? nlohmann::json(value) : nlohmann::json(nullptr); };
  const auto bytes = [](double value) { return static_cast<int64_t>(value); };
  const MappedPlan& plan = report.plan;
  return {{"mapped_bytes", bytes(plan.mapped)},
          {"bytes_of_every_token", bytes(plan.always)},
          {"expert_bytes", bytes(plan.experts)},
          {"expert_bytes_per_token", bytes(plan.experts_per_token)},
          {"resident_share_of_experts", plan.resident_share},
          {"free_bytes", bytes(report.free)},
          {"disk_bytes_per_second", known(report.measured.disk)},
          {"product_bytes_per_second", known(report.measured.products)},
          {"decode_tokens_per_second", known(plan.tokens_per_second)}};
}

}  // namespace mixtral::app
