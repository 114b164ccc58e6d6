// What the ranks of one model compare before they load it.
#pragma once

#include <string>

#include "../model/config.h"
#include "../model/placement.h"
#include "../model/weight_type.h"

namespace mixtral {

class Checkpoint;

// What must be the same on every rank, in several lines: build, layout, weights and their type, how the processor adds
// (ranks that compute the same thing twice must get the same bits), configuration.
std::string rank_description(const Config& config, const Checkpoint& checkpoint, const WeightType& type,
                             const Placement& placement);

}  // namespace mixtral
