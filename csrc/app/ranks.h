// The processes over which a command splits its model.
#pragma once

#include <nlohmann/json.hpp>

#include "../checkpoint/load_options.h"
#include "../engine/engine.h"
#include "flags.h"

namespace mixtral::app {

bool is_split(const ModelFlags& flags);
// Starts or joins the other ranks, and sets what this one loads. Nothing happens for a model that is not split. Throws
// LoadError when the model cannot be cut as the flags say.
void join_ranks(const ModelFlags& flags, LoadOptions& options);

// What each command that loads a model calls first. A process that is a rank, but not the first, loads its part here,
// does what the first one wants of it, and ends with it: it does not return.
void follow_as_rank(const ModelFlags& flags);

// How the model is split; null where it is not.
nlohmann::json parallel_json(const ModelFlags& flags, const Engine& engine);

}  // namespace mixtral::app
