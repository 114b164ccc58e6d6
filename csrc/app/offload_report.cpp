#include "offload_report.h"

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "report.h"
#include "signals.h"

namespace mixtral::app {
namespace {

template <typename... Values>
std::string text_of(const char* format, Values... values) {
  char text[200];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

std::vector<int64_t> on_gpu_by_layer(const OffloadPlan& plan) {
  std::vector<int64_t> layers;
  for (const auto& layer : plan.on_device) layers.push_back(std::accumulate(layer.begin(), layer.end(), int64_t{0}));
  return layers;
}

// "3 of each layer", "2 to 3 of each layer"
std::string of_each_layer(const std::vector<int64_t>& counts) {
  const auto [least, most] = std::minmax_element(counts.begin(), counts.end());
  return (*least == *most ? "" : std::to_string(*least) + " to ") + std::to_string(*most) + " of each layer";
}

double cpu_expert_bytes(const OffloadPlan& plan) {
  return plan.expert * static_cast<double>(plan.num_experts() - plan.num_on_device());
}

// The CPU keeps copies of those that are on the GPU.
double cpu_bytes(const OffloadPlan& plan) {
  return plan.expert * static_cast<double>(plan.num_experts()) + plan.staging();
}

std::string seconds_text(double seconds) {
  return seconds < 1 ? text_of("%.3g ms", 1e3 * seconds) : text_of("%.3g s", seconds);
}

std::string decode_text(const OffloadReport& report) {
  const OffloadPlan& plan = report.plan;
  const OffloadRates& rates = report.rates;
  const double seconds = report.decode_seconds();
  const std::string unknown = "the GPU's part is not known: this build or this machine has none";
  if (!rates.has_device && plan.misses == 0) return "not known: no choice is a miss, and " + unknown;
  std::string text = rates.has_device ? "" : "at most ";
  text += text_of("%.3g tokens/s: ", 1 / seconds) + seconds_text(seconds) + " a token, ";
  if (rates.has_device) {
    text += "of which " + seconds_text(rates.fixed) + " beside the experts, " + text_of("%.1f x ", plan.hits) +
            seconds_text(rates.hit) + " of hits, ";
  }
  text += text_of("%.1f x ", plan.misses) + seconds_text(rates.miss) + " of misses";
  return rates.has_device ? text : text + "; " + unknown;
}

}  // namespace

OffloadReport report_offload(const ModelFlags& flags, const Config& config, const WeightType& type,
                             const MemoryPlan& memory) {
  OffloadReport report;
  report.plan = plan_offload(config, type, flags.device, flags.gpu_memory, flags.routing_counts);
  report.rates = measure_offload(config, type, flags.device, throw_if_terminated);
  report.memory = memory;
  report.gpu_memory = flags.gpu_memory;
  report.simulated = flags.simulate_gpu;
  return report;
}

std::vector<std::pair<std::string, std::string>> offload_rows(const OffloadReport& report) {
  const OffloadPlan& plan = report.plan;
  const int64_t experts = plan.num_experts(), on_gpu = plan.num_on_device();
  const std::vector<int64_t> by_layer = on_gpu_by_layer(plan);
  std::vector<int64_t> others;
  for (size_t layer = 0; layer < by_layer.size(); ++layer)
    others.push_back(static_cast<int64_t>(plan.on_device[layer].size()) - by_layer[layer]);
  return {
      {"gpu memory", std::string(report.simulated ? "simulated, " : "") +
                         bytes_text(static_cast<double>(report.gpu_memory)) + ": " + bytes_text(plan.others) +
                         " of weights beside the experts, " + bytes_text(plan.activations) + " of activations, " +
                         bytes_text(plan.staging()) + " of staging buffers, " + bytes_text(plan.on_device_bytes()) +
                         " of experts; and beside it the cache"},
      {"on the gpu", std::to_string(on_gpu) + " of " + std::to_string(experts) + " experts, " +
                         of_each_layer(by_layer) + " (" + bytes_text(plan.expert) + " each)"},
      {"on the cpu", std::to_string(experts - on_gpu) + " experts, " + of_each_layer(others) + " (" +
                         bytes_text(cpu_expert_bytes(plan)) + "); with copies of the others and page-locked memory " +
                         bytes_text(cpu_bytes(plan))},
      {"a token", text_of("%.1f choices find their expert on the GPU and %.1f miss it, by ", plan.hits, plan.misses) +
                      (plan.by_counts ? "the routing counts" : "even routing")},
      {"decode", decode_text(report)}};
}

nlohmann::json offload_json(const OffloadReport& report) {
  const auto bytes = [](double value) { return static_cast<int64_t>(value); };
  const auto known = [](bool is_known, double value) { return is_known ? nlohmann::json(value) : nlohmann::json(); };
  const OffloadPlan& plan = report.plan;
  const OffloadRates& rates = report.rates;
  const int64_t on_gpu = plan.num_on_device();
  return {{"gpu_memory_bytes", report.gpu_memory},
          {"simulated", report.simulated},
          {"fixed_bytes", bytes(plan.others)},
          {"activations_bytes", bytes(plan.activations)},
          {"staging_bytes", bytes(plan.staging())},
          {"expert_bytes", bytes(plan.expert)},
          {"gpu_experts", on_gpu},
          {"gpu_experts_by_layer", on_gpu_by_layer(plan)},
          {"gpu_expert_bytes", bytes(plan.on_device_bytes())},
          {"cpu_experts", plan.num_experts() - on_gpu},
          {"cpu_expert_bytes", bytes(cpu_expert_bytes(plan))},
          {"cpu_bytes", bytes(cpu_bytes(plan))},
          {"kv_bytes", bytes(report.memory.cache)},
          {"routing", plan.by_counts ? "counts" : "even"},
          {"hits_per_token", plan.hits},
          {"misses_per_token", plan.misses},
          {"fixed_seconds", known(rates.has_device, rates.fixed)},
          {"hit_seconds", known(rates.has_device, rates.hit)},
          {"miss_seconds", rates.miss},
          {"misses_seconds_per_token", plan.misses * rates.miss},
          {"decode_seconds_per_token", known(rates.has_device, report.decode_seconds())},
          {"decode_tokens_per_second", known(rates.has_device, 1 / report.decode_seconds())}};
}

}  // namespace mixtral::app
