// The memory that a model, or one of its ranks, needs, from its configuration alone: known before anything is
// allocated.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../model/config.h"
#include "../model/defaults.h"
#include "../model/memory.h"
#include "../model/placement.h"
#include "../model/weight_type.h"

namespace mixtral {

struct MemoryPlan {
  double weights = 0;
  double loading = 0;      // more, while weights are packed
  double unpacking = 0;    // on CUDA: a quantised matrix as bf16, for kernels that cannot read it packed
  double activations = 0;  // of one forward pass
  int64_t ctx_size = 0, cached_tokens = 0;
  double cache = 0;  // of one sequence as long as the context

  // Without the cache: how much of it a run needs depends on its prompts.
  double to_load() const { return weights + loading + unpacking + activations; }
};

// Of one rank. device: "cpu" or "cuda"; ctx_size 0: the model's; chunk_size: tokens of one forward pass.
MemoryPlan plan_memory(const Config& config, const WeightType& type, const std::string& device, int64_t ctx_size = 0,
                       int64_t chunk_size = kChunkSize, const Placement& placement = {});

using FreeMemory = std::function<int64_t(const std::string& device)>;  // bytes

// Throws OutOfMemory, with the plan and with the types that would fit, unless `what` fits on `device`: the model, or
// what one rank holds of it.
void check_fits(const std::string& what, const Config& config, const WeightType& type, const std::string& device,
                const FreeMemory& free = available_memory, const Placement& placement = {});

// What a rank needs to load its part, and where it does that.
struct RankMemory {
  std::string host;
  double bytes = 0;
};

// Throws OutOfMemory unless the parts of `what` that the ranks on the host of `rank` hold fit there together.
void check_fits_host(const std::string& what, const std::vector<RankMemory>& ranks, size_t rank, double available);

}  // namespace mixtral
