#include "load.h"

#include <unistd.h>

#include <cstdlib>
#include <set>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "../checkpoint/folder.h"
#include "../distributed/communicator.h"
#include "../engine/threads.h"
#include "../engine/trace_file.h"
#include "../io/load_error.h"
#include "../io/printable.h"
#include "ranks.h"
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

}  // namespace

void use_threads(const ModelFlags& flags) {
  if (flags.threads == 0) return;
  try_threads(flags.threads);
  mixtral::use_threads(static_cast<int>(flags.threads));
}

LoadOptions load_options(const ModelFlags& flags) {
  LoadOptions options;
  options.device = flags.device;
  options.dtype = flags.dtype;
  options.lora = flags.lora;
  options.check_weights = flags.check_weights;
  options.experts_per_token = flags.experts_per_token;
  options.weights = parse_weights(flags.weights);
  options.gpu_memory = flags.gpu_memory;
  options.mlock = flags.mlock;
  options.routing_counts = flags.routing_counts;
  options.simulate_gpu = flags.simulate_gpu;
  if (options.weights == Weights::kMmap) install_bus_error_handler();
  join_ranks(flags, options);
  if (!options.world || options.world->rank() == 0) options.warn = warn;  // once for all ranks
  use_threads(flags);
  return options;
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

namespace {

LoadedEngine load(const ModelFlags& flags, std::optional<Tokenizer> tokenizer, const Engine::Options& options) {
  const double start = seconds_now();
  LoadOptions load = load_options(flags);
  ProgressBar bar("loading", bytes_text);
  load.progress = [&bar](uint64_t done, uint64_t total) {
    throw_if_terminated();
    bar.update(static_cast<double>(done), static_cast<double>(total));
  };
  return {Engine::from_pretrained(model_path(flags), load, options, std::move(tokenizer)), seconds_now() - start};
}

}  // namespace

LoadedEngine load_engine(const ModelFlags& flags, std::optional<Tokenizer> tokenizer, Engine::Options options) {
  options.chunk_size = flags.chunk_size;
  options.ctx_size = flags.ctx_size;
  options.cuda_graph = !flags.no_cuda_graph;
  options.speculate = flags.speculate;
  options.kv_memory = flags.kv_memory;
  return load(flags, std::move(tokenizer), options);
}

LoadedEngine load_idle_engine(const ModelFlags& flags, std::optional<Tokenizer> tokenizer) {
  Engine::Options options;
  options.max_batch = 1;
  options.ctx_size = 1;
  return load(flags, std::move(tokenizer), options);
}

void check_trace_file(const RoutingFlags& flags) {
  if (flags.trace.empty()) return;
  const auto folder = std::filesystem::absolute(flags.trace).parent_path();
  if (::access(folder.c_str(), W_OK) != 0 || std::filesystem::is_directory(flags.trace))
    throw std::invalid_argument("--trace: cannot write " + flags.trace);
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

void save_trace(const RoutingFlags& flags, Trace& trace, const Engine& engine, const Tokenizer* tokenizer) {
  trace.model = trace_fingerprint(engine.model());
  describe_tokens(trace, tokenizer, engine.config());
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
