#include "memory_plan.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../io/size.h"
#include "../model/parameters.h"
#include "../model/rolling_kv_cache.h"

namespace mixtral {
namespace {

constexpr double kPackingBytes = 4 << 20;  // of a thread: rows as read (row_reader.cpp), as converted, and as packed

// The values of one token that are alive at a time: the residual and its norm; then q, k, v and the result of
// attention, or the rows of its experts with gate, up, their product and the output. A rank has its own heads of q, k
// and v, and the result of all; its own part of gate and up, and of a dense block the products of all. Every token may
// choose the experts of one rank.
int64_t values_per_token(const Config& config, const Placement& placement) {
  const int64_t copies = config.is_moe() ? config.top_k : 1, own = placement.intermediate_size(config);
  const int64_t attention =
      (placement.num_heads(config) + config.num_heads + 2 * placement.num_kv_heads(config)) * config.head_dim;
  const int64_t products = !config.is_moe() && placement.expert_parallel ? config.intermediate_size : own;
  const int64_t experts = copies * (2 * config.hidden_size + 2 * own + products);
  return 2 * config.hidden_size + std::max(attention, experts);
}

int64_t values_of_largest_matrix(const Config& config, const Placement& placement) {
  int64_t largest = 0;
  for (Parameter& parameter : placed_parameters(config, placement)) {
    parameter.shape = shard_of(parameter, config, placement).shape;
    if (parameter.is_matrix) largest = std::max(largest, parameter.size());
  }
  return largest;
}

// Weight types that exist for the model and fit, best first: "bfloat16 (86.99 GiB)" or "int4 on cpu (24.54 GiB)".
std::vector<std::string> types_that_fit(const Config& config, double less_than, const std::string& device,
                                        const FreeMemory& free, const Placement& placement) {
  std::vector<std::string> found;
  std::vector<std::string> devices = {device};
  if (device != "cpu") devices.emplace_back("cpu");
  for (const std::string& other : devices) {
    for (const char* name : {"bfloat16", "int8", "fp8", "int4"}) {
      try {
        const WeightType type = parse_weight_type(name, config, other, /*pack=*/true, placement);
        const MemoryPlan plan = plan_memory(config, type, other, 0, kChunkSize, placement);
        const bool is_less = plan.weights < less_than || other != device;
        if (is_less && plan.to_load() <= static_cast<double>(free(other)))
          found.push_back(type.name() + (other != device ? " on cpu" : "") + " (" + bytes_text(plan.to_load()) + ")");
      } catch (const std::invalid_argument&) {  // not on this device, or not for this checkpoint
      }
    }
  }
  return found;
}

}  // namespace

MemoryPlan plan_memory(const Config& config, const WeightType& type, const std::string& device, int64_t ctx_size,
                       int64_t chunk_size, const Placement& placement) {
  const int64_t element_size = type.element_size();
  MemoryPlan plan;
  plan.weights = weight_bytes(config, type, placement);
  plan.loading = type.packing == Packing::kNone ? 0 : kPackingBytes * at::get_num_threads();
  if (device != "cpu" && type.packing != Packing::kNone)
    plan.unpacking = static_cast<double>(values_of_largest_matrix(config, placement) * element_size);
  plan.ctx_size = ctx_size > 0 ? ctx_size : config.max_position;
  plan.activations = static_cast<double>(chunk_size * values_per_token(config, placement) * element_size);
  plan.cached_tokens = RollingKVCache::pages_needed(config, kPageSize, chunk_size, plan.ctx_size) * kPageSize;
  plan.cache = static_cast<double>(plan.cached_tokens * placement.kv_bytes_per_token(config, element_size));
  return plan;
}

void check_fits(const std::string& what, const Config& config, const WeightType& type, const std::string& device,
                const FreeMemory& free, const Placement& placement) {
  const MemoryPlan plan = plan_memory(config, type, device, 0, kChunkSize, placement);
  const auto available = static_cast<double>(free(device));
  if (plan.to_load() <= available) return;
  std::string message = out_of_memory_text(what, plan.to_load(), device, available);
  message += "; " + type.name() + " weights " + bytes_text(plan.weights) + ", activations " +
             bytes_text(plan.activations) + ", and a cache of up to " + bytes_text(plan.cache) + " for a context of " +
             std::to_string(plan.ctx_size);
  std::string fitting;
  for (const std::string& choice : types_that_fit(config, plan.weights, device, free, placement))
    fitting += (fitting.empty() ? "" : ", ") + choice;
  throw OutOfMemory(message + (fitting.empty() ? "; no other dtype fits" : "; what would fit: " + fitting));
}

void check_fits_host(const std::string& what, const std::vector<RankMemory>& ranks, size_t rank, double available) {
  double bytes = 0;
  std::string names;
  int count = 0;
  for (size_t other = 0; other < ranks.size(); ++other) {
    if (ranks[other].host != ranks[rank].host) continue;
    bytes += ranks[other].bytes;
    names += (names.empty() ? "" : ", ") + std::to_string(other);
    ++count;
  }
  if (count > 1 && bytes > available)
    throw OutOfMemory(
        out_of_memory_text(what + " for ranks " + names + ", which share a host", bytes, "cpu", available));
}

}  // namespace mixtral
