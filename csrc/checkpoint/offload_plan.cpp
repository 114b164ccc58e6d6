#include "offload_plan.h"

#include <numeric>
#include <stdexcept>

#include "../io/size.h"
#include "../model/packing.h"
#include "../model/parameters.h"

namespace mixtral {
namespace {

int64_t sum(const std::vector<int64_t>& values) { return std::accumulate(values.begin(), values.end(), int64_t{0}); }

// Of the choices of a layer, those whose expert is on the device.
double share_of_hits(const std::vector<int64_t>& on_device, const std::vector<int64_t>& counts) {
  const auto experts = static_cast<double>(on_device.size());
  if (counts.empty() || sum(counts) == 0) return static_cast<double>(sum(on_device)) / experts;
  const int64_t hits = std::inner_product(on_device.begin(), on_device.end(), counts.begin(), int64_t{0});
  return static_cast<double>(hits) / static_cast<double>(sum(counts));
}

}  // namespace

int64_t OffloadPlan::num_experts() const {
  return on_device.empty() ? 0 : static_cast<int64_t>(on_device.size() * on_device.front().size());
}

int64_t OffloadPlan::num_on_device() const {
  int64_t count = 0;
  for (const auto& layer : on_device) count += sum(layer);
  return count;
}

OffloadPlan plan_offload(const Config& config, const WeightType& type, const std::string& device, int64_t gpu_memory,
                         const std::filesystem::path& routing_counts) {
  if (!config.is_moe()) throw std::invalid_argument("gpu_memory needs a model with experts");
  OffloadPlan plan;
  double experts = 0;
  for (const Parameter& parameter : model_parameters(config)) {
    const auto meta = empty_parameter(parameter, scalar_type(type.dtype), torch::kMeta, type.packing);
    (parameter.is_expert ? experts : plan.others) += static_cast<double>(meta.nbytes());
  }
  plan.expert = experts / static_cast<double>(config.num_layers * config.num_experts);
  const MemoryPlan memory = plan_memory(config, type, device);
  plan.activations = memory.activations + memory.unpacking;
  const double needed = plan.others + plan.activations + plan.staging(), given = static_cast<double>(gpu_memory);
  if (given < needed) {
    throw OutOfMemory("gpu_memory must be at least " + bytes_text(needed) + ": " + bytes_text(plan.others) +
                      " of weights beside the experts, " + bytes_text(plan.activations) +
                      " of activations, two experts of " + bytes_text(plan.expert) + "; got " + bytes_text(given));
  }
  const ExpertTable counts = routing_counts.empty() ? ExpertTable() : read_expert_counts(routing_counts);
  plan.on_device = place_experts(config, static_cast<int64_t>((given - needed) / plan.expert), counts);
  plan.by_counts = !counts.empty();
  for (size_t layer = 0; layer < plan.on_device.size(); ++layer)
    plan.hits += static_cast<double>(config.top_k) *
                 share_of_hits(plan.on_device[layer], counts.empty() ? std::vector<int64_t>() : counts[layer]);
  plan.misses = static_cast<double>(config.num_layers * config.top_k) - plan.hits;
  return plan;
}

}  // namespace mixtral
