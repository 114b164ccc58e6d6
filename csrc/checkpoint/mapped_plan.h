// What a model in mapped files (LoadOptions::weights) will need and do, before it is loaded.
#pragma once

#include "memory_plan.h"

namespace mixtral {

// Bytes per second that come from the disk, and at which weights in memory are read and multiplied.
struct Bandwidths {
  double disk = 0, products = 0;  // 0: not known
};

struct MappedPlan {
  double mapped = 0;             // bytes of weights in files
  double always = 0;             // of these, what every token reads: all but experts, and of the embeddings one row
  double experts = 0;            // all of them
  double experts_per_token = 0;  // those that one token goes to, in all layers
  double resident_share = 0;     // of the experts, when the rest of the memory is theirs
  double tokens_per_second = 0;  // of decoding one sequence; 0: the bandwidths are not known
};

// `free`: bytes for the weights and what `memory` counts beside them. A token reads `always` and its experts from
// memory, and first those experts from the disk that are not there. Routing is taken as even: then the share of the
// choices that find their expert in memory is the share of the experts that are there.
MappedPlan plan_mapped(const Config& config, const WeightType& type, const MemoryPlan& memory, double free,
                       const Bandwidths& bandwidths);

}  // namespace mixtral
