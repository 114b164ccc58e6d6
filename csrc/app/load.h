// From flags to a loaded model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>

#include "../checkpoint/load_options.h"
#include "../engine/engine.h"
#include "../engine/trace.h"
#include "../model/config.h"
#include "../model/weight_type.h"
#include "../text/tokenizer.h"
#include "flags.h"

namespace mixtral::app {

// The folder that MODEL means (checkpoint/folder.h), or the demo model's.
std::filesystem::path model_path(const ModelFlags& flags);
// One line on stderr; the same message once.
void warn(const std::string& message);
// The model's; warns where its files disagree.
Tokenizer load_tokenizer(const ModelFlags& flags);
WeightType weight_type_of(const ModelFlags& flags, const Config& config);
int64_t context_of(const ModelFlags& flags, const Config& config);

// As many CPU threads as --threads says.
void use_threads(const ModelFlags& flags);
// What the flags say of reading the weights, with warn(); of several ranks, this process has joined the others then,
// and rank 0 warns.
LoadOptions load_options(const ModelFlags& flags);

struct LoadedEngine {
  Engine engine;
  double seconds;  // it took to load
};
// Reads the weights, with a progress bar on a terminal when that takes long. `options` that are also flags come from
// `flags`. Of several ranks this process is the first one (follow_as_rank).
LoadedEngine load_engine(const ModelFlags& flags, std::optional<Tokenizer> tokenizer, Engine::Options options = {});
// For a command that calls the model itself, with caches of its own: the engine is there for the other ranks, and its
// cache is as small as can be.
LoadedEngine load_idle_engine(const ModelFlags& flags, std::optional<Tokenizer> tokenizer);

// Throws std::invalid_argument when the file of --trace cannot be written: called before the work.
void check_trace_file(const RoutingFlags& flags);
// The trace of --replay; null without one. Throws LoadError.
std::shared_ptr<const Trace> read_replay(const RoutingFlags& flags);
// Throws LoadError when the trace of --replay is of another model.
void check_replay(const RoutingFlags& flags, const std::shared_ptr<const Trace>& replay, const Engine& engine);
// Writes the file of --trace. `tokenizer` may be null.
void save_trace(const RoutingFlags& flags, Trace& trace, const Engine& engine, const Tokenizer* tokenizer);

// Of a --prompt-cache. Nothing happens without a name, or where no file is yet.
void load_prompt_cache(Engine& engine, const std::string& file);
void save_prompt_cache(Engine& engine, const Generation& generation, const std::string& file);

}  // namespace mixtral::app
