// `mixtral perplexity`: how well a model predicts a text.
#include <cstdio>
#include <memory>
#include <optional>
#include <stdexcept>

#include "../checkpoint/config_reader.h"
#include "../engine/score.h"
#include "commands.h"
#include "flags.h"
#include "load.h"
#include "perplexity_contexts.h"
#include "ranks.h"
#include "report.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

struct PerplexityFlags {
  ModelFlags model;
  std::vector<std::string> paths;  // [MODEL] FILE
  std::string compare_dtype;       // empty: no comparison
  RoutingFlags routing;
  ContextFlags contexts;
};

struct Scored {
  std::string dtype;
  Score score;
  double seconds;  // without loading
};

// Frees the weights before it returns: a second model may need the memory.
Scored measure(const ModelFlags& flags, const RoutingFlags& routing, const Config& config, const Tokenizer& tokenizer,
               const std::string& text) {
  check_trace_file(routing);
  const std::shared_ptr<const Trace> replay = read_replay(routing);
  LoadedEngine loaded = load_idle_engine(flags, tokenizer);
  ProgressBar bar("scoring", tokens_text);
  ScoreOptions options;
  options.ctx_size = flags.ctx_size;
  options.chunk_size = flags.chunk_size;
  options.kv_memory = flags.kv_memory;
  options.progress = progress_on(bar);
  check_replay(routing, replay, loaded.engine);
  options.replay = replay.get();
  std::optional<Trace> trace;
  if (!routing.trace.empty()) {
    const int64_t top_k = replay ? replay->routing.top_k : loaded.engine.config().top_k;
    options.trace = &trace.emplace(empty_trace(loaded.engine.config(), top_k));
  }
  const double start = seconds_now();
  const Score score = mixtral::score(loaded.engine.model(), tokenizer, text, options);
  const double seconds = seconds_now() - start;
  if (trace) save_trace(routing, *trace, loaded.engine, &tokenizer);
  return {weight_type_of(flags, config).name(), score, seconds};
}

// In per cent of `other`'s bits per byte: positive when `result` predicts the text less well.
double difference_percent(const Scored& result, const Scored& other) {
  return 100 * (result.score.bits_per_byte() / other.score.bits_per_byte() - 1);
}

nlohmann::json to_json(const Scored& result) {
  return {{"dtype", result.dtype},
          {"tokens", result.score.tokens},
          {"bytes", result.score.bytes},
          {"nats_per_token", result.score.nats_per_token()},
          {"perplexity", result.score.perplexity()},
          {"bits_per_byte", result.score.bits_per_byte()},
          {"seconds", result.seconds}};
}

std::string to_text(const Scored& result) {
  char text[400];
  std::snprintf(text, sizeof text,
                "dtype           %12s\n"
                "tokens          %12lld  (%lld bytes)\n"
                "nats per token  %12.5f\n"
                "perplexity      %12.4f\n"
                "bits per byte   %12.5f\n"
                "time            %12.2f s  (%.1f tokens/s)\n",
                result.dtype.c_str(), static_cast<long long>(result.score.tokens),
                static_cast<long long>(result.score.bytes), result.score.nats_per_token(), result.score.perplexity(),
                result.score.bits_per_byte(), result.seconds, per_second(result.score.tokens, result.seconds));
  return text;
}

void run(PerplexityFlags& flags) {
  if (flags.paths.size() > 2) throw std::invalid_argument("unexpected argument " + flags.paths[2]);
  const std::string file = flags.paths.back();
  if (flags.paths.size() == 2) flags.model.model = flags.paths.front();
  if (!flags.compare_dtype.empty() && is_split(flags.model))
    throw std::invalid_argument("--compare-dtype loads two models, which is for one process");
  follow_as_rank(flags.model);
  if (!flags.contexts.contexts.empty()) {
    if (!flags.compare_dtype.empty()) throw std::invalid_argument("--compare-dtype goes without --contexts");
    if (!flags.routing.trace.empty()) throw std::invalid_argument("--trace goes without --contexts");
    if (!flags.routing.replay.empty()) throw std::invalid_argument("--replay goes without --contexts");
    return run_contexts(flags.model, flags.contexts, file);
  }
  for (const CLI::Option* option : flags.contexts.need_contexts)
    if (option->count() > 0) throw std::invalid_argument(option->get_name() + " needs --contexts");
  const std::string text = read_text(file);
  if (text.empty()) throw std::invalid_argument("FILE must not be empty, got " + file);
  const std::filesystem::path folder = model_path(flags.model);
  const Config config = read_config(folder);
  const Tokenizer tokenizer = load_tokenizer(flags.model);

  const Scored result = measure(flags.model, flags.routing, config, tokenizer, text);
  nlohmann::json json = to_json(result);
  std::string report = to_text(result);
  if (!flags.compare_dtype.empty()) {
    ModelFlags other_model = flags.model;
    other_model.dtype = flags.compare_dtype;
    const Scored other = measure(other_model, {}, config, tokenizer, text);
    const double difference = difference_percent(result, other);
    json["compared_with"] = to_json(other);
    json["bits_per_byte_difference_percent"] = difference;
    char line[80];
    std::snprintf(line, sizeof line, "\n%s needs %+.3f %% bits per byte against %s\n", result.dtype.c_str(), difference,
                  other.dtype.c_str());
    report += "\n" + to_text(other) + line;
  }
  write_out(flags.contexts.result.json ? json_line(json) : report);
}

}  // namespace

void add_perplexity(CLI::App& app) {
  auto flags = std::make_shared<PerplexityFlags>();
  CLI::App& command = *app.add_subcommand("perplexity", "Measure how well a model predicts a text");
  command.add_option("FILE", flags->paths, "The text, and before it the folder of the checkpoint")
      ->option_text("[MODEL] FILE")
      ->expected(-1)
      ->required();
  CLI::Option* const compare = add_dtype(command, "--compare-dtype", flags->compare_dtype,
                                         "Score the text again with weights of this type, and tell the difference");
  add_routing_flags(command, flags->routing);
  command.get_option("--replay")->excludes(compare);
  add_switch(command, "--json", flags->contexts.result.json, "One JSON object");
  add_context_flags(command, flags->contexts);
  add_model_flags(command, flags->model, "-m,--model");
  add_loading_flags(command, flags->model);
  add_weights_flag(command, flags->model);
  add_mlock_flag(command, flags->model);
  add_offload_flags(command, flags->model);
  add_experts_flag(command, flags->model);
  add_rank_flags(command, flags->model);
  add_kv_memory_flag(command, flags->model);
  add_speculate_flag(command, flags->model);
  command.get_option("--speculate")->description("No effect: the text is given, so there is nothing to guess");
  command.footer(
      "A text longer than the context is cut into segments of --ctx-size tokens. Each starts anew, behind a BOS token\n"
      "of its own, so every token is predicted once. --chunk-size bounds the memory and does not change the result.\n"
      "With --contexts, FILE may be a .jsonl of documents, each under \"text\". Protocols: docs/long_context.md.\n\n"
      "Examples:\n"
      "  mixtral perplexity held_out.txt\n"
      "  mixtral perplexity ./Mixtral-8x7B-v0.1 held_out.txt --ctx-size 4096 --json\n"
      "  mixtral perplexity held_out.txt --contexts 64,128,256,512 --targets last:256 --json --svg loss.svg\n"
      "  mixtral perplexity held_out.txt --contexts 512 --protocol sliding:64 --targets all\n"
      "  mixtral perplexity ./Mixtral-8x7B-v0.1 held_out.txt --dtype float16 --compare-dtype bfloat16");
  command.callback([flags] { run(*flags); });
}

}  // namespace mixtral::app
