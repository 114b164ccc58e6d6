// What the ranks of one model tell each other while they load it: all of them get their part, or none does.
#pragma once

#include <functional>
#include <string>

#include "../distributed/communicator.h"
#include "../model/config.h"
#include "../model/placement.h"
#include "../model/weight_type.h"

namespace mixtral {

class Checkpoint;

// What must be the same on every rank, in several lines: build, configuration, weights, their type, layout, and how the
// processor adds, for ranks that compute the same thing twice must get the same bits.
std::string rank_description(const Config& config, const Checkpoint& checkpoint, const WeightType& type,
                             const Placement& placement);

// Runs `step`, and returns when every rank of `world` has done so with the same result. A LoadError of one rank is one
// of all ranks, and so are results that differ. What else `step` throws reaches the other ranks as a RankError.
void agree(Communicator& world, const std::function<std::string()>& step);

}  // namespace mixtral
