// What each process of a model that is split over several would hold.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "../model/config.h"
#include "flags.h"

namespace mixtral::app {

// By rank: its layers, heads and experts, and bytes. Throws LoadError when the model cannot be split that way.
nlohmann::json rank_plan(const ModelFlags& model, const ParallelFlags& parallel, const Config& config);
// The same as lines of `mixtral info`.
std::string plan_text(const nlohmann::json& plan);

}  // namespace mixtral::app
