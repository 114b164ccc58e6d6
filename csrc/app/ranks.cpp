#include "ranks.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../checkpoint/config_reader.h"
#include "../checkpoint/from_pretrained.h"
#include "../distributed/ranks.h"
#include "../io/load_error.h"
#include "../model/follower.h"
#include "../model/transformer.h"
#include "errors.h"
#include "load.h"
#include "signals.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

Placement placement_of(const ParallelFlags& flags, int rank) {
  return Placement::of_rank(rank, flags.tensor_size, flags.stages, flags.expert_parallel);
}

// Whether the model can be cut as the flags say; before any process is started for that.
void check_layout(const ModelFlags& flags) {
  try {
    placement_of(flags.parallel, 0).check(read_config(model_path(flags)));
  } catch (const std::invalid_argument& error) {
    throw LoadError(model_path(flags).string(), "", error.what());
  }
}

RankOptions rank_options(const ModelFlags& flags) {
  RankOptions options;
  options.tensor_size = flags.parallel.tensor_size;
  options.stages = flags.parallel.stages;
  options.expert_parallel = flags.parallel.expert_parallel;
  options.backend = flags.parallel_backend;
  options.device = flags.device;
  options.timeout = static_cast<double>(flags.rank_timeout);
  return options;
}

}  // namespace

bool is_split(const ModelFlags& flags) { return flags.parallel.tensor_size * flags.parallel.stages > 1; }

void join_ranks(const ModelFlags& flags, LoadOptions& options) {
  if (!is_split(flags)) return;
  check_layout(flags);
  options.world = mixtral::join_ranks(rank_options(flags));
  options.placement = placement_of(flags.parallel, options.world->rank());
}

void follow_as_rank(const ModelFlags& flags) {
  const char* const rank = std::getenv("RANK");
  if (!is_split(flags) || rank == nullptr || std::string(rank) == "0") return;
  ignore_sigint();
  {
    const bool rank_0_tells = is_child_rank();
    const LoadOptions options = load_options(flags);
    if (rank_0_tells) write_no_errors();
    Mixtral model = from_pretrained(model_path(flags), options);
    follow(*model);
  }
  std::exit(kOk);
}

nlohmann::json parallel_json(const ModelFlags& flags, const Engine& engine) {
  const Placement& placement = engine.model().placement();
  if (placement.is_whole()) return nullptr;
  return {{"tensor_parallel_size", placement.tensor_size},
          {"pipeline_parallel_size", placement.stages},
          {"expert_parallel", placement.expert_parallel},
          {"backend", backend_of(rank_options(flags))}};
}

}  // namespace mixtral::app
