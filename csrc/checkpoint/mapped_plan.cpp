#include "mapped_plan.h"

#include <algorithm>

#include "../model/parameters.h"

namespace mixtral {

MappedPlan plan_mapped(const Config& config, const WeightType& type, const MemoryPlan& memory, double free,
                       const Bandwidths& bandwidths) {
  MappedPlan plan;
  plan.mapped = memory.weights;
  for (const Parameter& parameter : model_parameters(config)) {
    const bool packed = parameter.packing(type.packing) != Packing::kNone;
    const double plain = parameter.is_f32 ? 4.0 : static_cast<double>(type.element_size());
    const double bytes = static_cast<double>(parameter.size()) * (packed ? bytes_per_weight(type) : plain);
    const bool one_row = parameter.name == "embed_tokens" && !config.tie_word_embeddings;
    if (parameter.is_expert) {
      plan.experts += bytes;
    } else if (!one_row) {
      plan.always += bytes;
    }
  }
  if (config.is_moe())
    plan.experts_per_token = plan.experts * static_cast<double>(config.top_k) / static_cast<double>(config.num_experts);
  const double room = free - memory.activations - memory.cache - plan.always;
  const double share = plan.experts > 0 ? room / plan.experts : room >= 0 ? 1 : 0;
  plan.resident_share = std::clamp(share, 0.0, 1.0);
  const double missing = plan.experts_per_token * (1 - plan.resident_share);
  if (bandwidths.products <= 0 || (missing > 0 && bandwidths.disk <= 0)) return plan;
  const double from_disk = missing > 0 ? missing / bandwidths.disk : 0;
  plan.tokens_per_second = 1 / ((plan.always + plan.experts_per_token) / bandwidths.products + from_disk);
  return plan;
}

}  // namespace mixtral
