#include "load.h"

#include <cstdlib>
#include <set>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "../checkpoint/config_reader.h"
#include "../checkpoint/folder.h"
#include "../checkpoint/from_pretrained.h"
#include "../checkpoint/load_options.h"
#include "../distributed/ranks.h"
#include "../engine/threads.h"
#include "../engine/trace_file.h"
#include "../io/load_error.h"
#include "../io/printable.h"
#include "../model/follower.h"
#include "../model/transformer.h"
#include "errors.h"
#include "report.h"
#include "signals.h"
#include "terminal.h"
#include "thread_trial.h"

namespace mixtral::app {
namespace {

std::filesystem::path demo_model() {
  if (const char* folder = std::getenv("MIXTRAL_DEMO_MODEL")) return folder;
  const std::filesystem::path bin = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  std::error_code error;
  // In the Python package, in the build folder of the source tree, where CMake installed it, and in a build folder
  // elsewhere.
  for (const std::filesystem::path& folder :
       {bin / "../models/demo", bin / "../../models/demo", bin / "../share/mixtral/models/demo",
        std::filesystem::path(MIXTRAL_SOURCE_DIR) / "models/demo"}) {
    if (std::filesystem::exists(folder / "config.json", error)) return std::filesystem::canonical(folder);
  }
  throw std::invalid_argument("no MODEL given, and the demo model is not installed: name a model folder");
}

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

// Starts or joins the ranks of the flags; without several of them this process is alone.
LoadOptions load_options(const ModelFlags& flags) {
  LoadOptions options;
  options.device = flags.device;
  options.dtype = flags.dtype;
  options.lora = flags.lora;
  options.check_weights = flags.check_weights;
  options.experts_per_token = flags.experts_per_token;
  if (is_split(flags)) {
    check_layout(flags);
    options.world = join_ranks(rank_options(flags));
    options.placement = placement_of(flags.parallel, options.world->rank());
  }
  if (flags.threads > 0) {
    try_threads(flags.threads);
    use_threads(static_cast<int>(flags.threads));
  }
  return options;
}

}  // namespace

bool is_split(const ModelFlags& flags) { return flags.parallel.tensor_size * flags.parallel.stages > 1; }

void follow_as_rank(const ModelFlags& flags) {
  const char* const rank = std::getenv("RANK");
  const bool is_child_of_rank_0 = std::getenv("MIXTRAL_LEADER") != nullptr;
  if (!is_split(flags) || rank == nullptr || std::string(rank) == "0") return;
  ignore_sigint();
  {
    const LoadOptions options = load_options(flags);
    if (is_child_of_rank_0) write_no_errors();
    Mixtral model = from_pretrained(model_path(flags), options);
    follow(*model);
  }
  std::exit(kOk);
}

std::filesystem::path model_path(const ModelFlags& flags) {
  return flags.model.empty() ? demo_model() : find_model(flags.model);
}

void warn(const std::string& message) {
  static std::set<std::string> said;  // a model may be opened twice
  if (said.insert(message).second) write_err("mixtral: warning: " + printable(message, 2048) + "\n");
}

Tokenizer load_tokenizer(const ModelFlags& flags) {
  Tokenizer tokenizer(model_path(flags));
  if (!tokenizer.note().empty()) warn(tokenizer.note());
  return tokenizer;
}

WeightType weight_type_of(const ModelFlags& flags, const Config& config) {
  return parse_weight_type(flags.dtype, config, flags.device);
}

int64_t context_of(const ModelFlags& flags, const Config& config) {
  return flags.ctx_size > 0 ? flags.ctx_size : config.max_position;
}

nlohmann::json LoadedEngine::parallel() const {
  const Placement& placement = engine.model().placement();
  if (placement.is_whole()) return nullptr;
  return {{"tensor_parallel_size", placement.tensor_size},
          {"pipeline_parallel_size", placement.stages},
          {"expert_parallel", placement.expert_parallel},
          {"backend", engine.model().world()->backend()}};
}

LoadedEngine load_engine(const ModelFlags& flags, std::optional<Tokenizer> tokenizer, Engine::Options options) {
  const double start = seconds_now();
  LoadOptions load = load_options(flags);
  load.warn = warn;
  ProgressBar bar("loading", bytes_text);
  load.progress = [&bar](uint64_t done, uint64_t total) {
    throw_if_terminated();
    bar.update(static_cast<double>(done), static_cast<double>(total));
  };
  options.chunk_size = flags.chunk_size;
  options.ctx_size = flags.ctx_size;
  options.cuda_graph = !flags.no_cuda_graph;
  options.speculate = flags.speculate;
  return {Engine::from_pretrained(model_path(flags), load, options, std::move(tokenizer)), seconds_now() - start};
}

std::shared_ptr<const Trace> read_replay(const RoutingFlags& flags) {
  return flags.replay.empty() ? nullptr : std::make_shared<const Trace>(read_trace(flags.replay));
}

void check_replay(const RoutingFlags& flags, const std::shared_ptr<const Trace>& replay, const Engine& engine) {
  try {
    if (replay) check_same_model(*replay, engine.model());
  } catch (const std::invalid_argument& error) {
    throw LoadError(flags.replay, "", error.what());
  }
}

void save_trace(const RoutingFlags& flags, Trace& trace, const Engine& engine, const Tokenizer& tokenizer) {
  trace.model = trace_fingerprint(engine.model());
  describe_tokens(trace, &tokenizer, engine.config());
  write_trace(trace, flags.trace);
}

void load_prompt_cache(Engine& engine, const std::string& file) {
  std::error_code ignored;
  if (!file.empty() && std::filesystem::exists(file, ignored)) engine.load_prompt_cache(file);
}

void save_prompt_cache(Engine& engine, const Generation& generation, const std::string& file) {
  if (file.empty()) return;
  std::vector<int64_t> ids = generation.prompt_token_ids;
  ids.insert(ids.end(), generation.token_ids.begin(), generation.token_ids.end());
  engine.save_prompt_cache(ids, file);
}

}  // namespace mixtral::app
