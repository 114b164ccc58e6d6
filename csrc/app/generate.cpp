// `mixtral generate`: one prompt in, streamed text or one JSON object out.
#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>

#include "../checkpoint/config_reader.h"
#include "commands.h"
#include "flags.h"
#include "load.h"
#include "ranks.h"
#include "report.h"
#include "signals.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

struct GenerateFlags {
  ModelFlags model;
  PromptFlags prompt;
  RoutingFlags routing;
  SamplingParams sampling;
  CLI::Option* max_tokens = nullptr;
  int64_t samples = 1;
  std::string prompt_cache;             // a file
  std::string plan_trace, plan_replay;  // files
  bool json = false, parse_special = false, generation_config = false;
};

// As many new tokens as were asked for, or as the context leaves where nobody asked. The engine checks this too, but
// only after the weights are read.
int64_t new_tokens(const GenerateFlags& flags, int64_t prompt_tokens, int64_t context) {
  const int64_t wanted = flags.sampling.max_tokens;
  const bool asked = flags.max_tokens->count() > 0;
  const int64_t room = context - prompt_tokens;
  if (room > 0 && (wanted <= room || !asked)) return std::min(wanted, room);
  throw std::invalid_argument("prompt of " + std::to_string(prompt_tokens) + " tokens" +
                              (asked ? " and --max-tokens " + std::to_string(wanted) + " do" : " does") +
                              " not fit the context of " + std::to_string(context) + " tokens");
}

nlohmann::json logprob_json(const std::optional<TokenLogprob>& chosen, const Tokenizer& tokenizer) {
  if (!chosen) return nullptr;
  nlohmann::json top = nlohmann::json::array();
  for (const auto& [id, logprob] : chosen->top) {
    top.push_back({{"token_id", id}, {"piece", tokenizer.piece(id)}, {"logprob", logprob}});
  }
  return {{"token_id", chosen->token_id},
          {"piece", tokenizer.piece(chosen->token_id)},
          {"logprob", chosen->logprob},
          {"top", top}};
}

// logprobs: [TokenLogprob], or optional ones.
template <typename List>
nlohmann::json logprobs_json(const List& logprobs, const Tokenizer& tokenizer) {
  nlohmann::json list = nlohmann::json::array();
  for (const auto& chosen : logprobs) list.push_back(logprob_json(chosen, tokenizer));
  return list;
}

nlohmann::json timings_json(const Timings& timings, int64_t samples, double load_seconds) {
  return {{"load_seconds", load_seconds},
          {"prompt_tokens", timings.prompt_tokens},
          {"cached_tokens", timings.cached_tokens},
          {"prefill_seconds", timings.prefill_seconds},
          {"prefill_tokens_per_second", prefill_rate(timings)},
          {"new_tokens", timings.new_tokens},
          {"decode_seconds", timings.decode_seconds},
          {"decode_tokens_per_second",
           per_second(decoded_tokens(timings, static_cast<size_t>(samples)), timings.decode_seconds)},
          {"drafted_tokens", timings.drafted_tokens},
          {"accepted_tokens", timings.accepted_tokens},
          {"peak_pages", timings.peak_pages}};
}

void print_json(const Generation& generation, const GenerateFlags& flags, const Tokenizer& tokenizer,
                const Timings& timings, const LoadedEngine& loaded) {
  nlohmann::json result = {{"text", generation.text},
                           {"prompt_token_ids", generation.prompt_token_ids},
                           {"token_ids", generation.token_ids},
                           {"finish_reason", generation.finish_reason},
                           {"timings", timings_json(timings, flags.samples, loaded.seconds)}};
  if (const nlohmann::json parallel = parallel_json(flags.model, loaded.engine); !parallel.is_null())
    result["parallel"] = parallel;
  if (flags.sampling.logprobs > 0) result["logprobs"] = logprobs_json(generation.logprobs, tokenizer);
  if (flags.sampling.prompt_logprobs > 0)
    result["prompt_logprobs"] = logprobs_json(generation.prompt_logprobs, tokenizer);
  write_out(json_line(result));
}

// One request for each sample; a seed gives each its own random numbers.
std::vector<Request> requests_of(const Request& first, int64_t samples) {
  std::vector<Request> requests(static_cast<size_t>(samples), first);
  if (!first.params.seed) return requests;
  for (int64_t i = 0; i < samples; ++i)
    requests[static_cast<size_t>(i)].params.seed = sample_seed(*first.params.seed, i);
  return requests;
}

void run(const CLI::App& command, GenerateFlags flags) {
  follow_as_rank(flags.model);
  if (flags.generation_config) use_generation_config(command, model_path(flags.model), flags.sampling);
  flags.sampling.validate();
  const std::string prompt = read_prompt(flags.prompt);
  const std::filesystem::path folder = model_path(flags.model);
  const Config config = read_config(folder);
  const Tokenizer tokenizer = load_tokenizer(flags.model);
  const std::vector<int64_t> ids = tokenizer.encode(prompt, /*add_bos=*/true, /*add_eos=*/false, flags.parse_special);
  flags.sampling.max_tokens = new_tokens(flags, static_cast<int64_t>(ids.size()), context_of(flags.model, config));

  check_trace_file(flags.routing);
  const std::shared_ptr<const Trace> replay = read_replay(flags.routing);
  Engine::Options options;
  options.plan_trace = flags.plan_trace;
  options.plan_replay = flags.plan_replay;
  LoadedEngine loaded = load_engine(flags.model, tokenizer, options);
  check_replay(flags.routing, replay, loaded.engine);
  if (replay) check_same_tokens(*replay, 0, ids);
  const bool streams = !flags.json && flags.samples == 1;
  if (streams && stdout_is_terminal()) write_out("\x1b[2m" + prompt + "\x1b[0m");
  const auto on_text = [streams](size_t, const std::string& piece) {
    if (streams && pending_signal() == 0) write_out(piece);
    return pending_signal() == 0;
  };
  load_prompt_cache(loaded.engine, flags.prompt_cache);
  Timings timings;
  const bool trace = !flags.routing.trace.empty();
  const Request request = {ids, flags.sampling, flags.model.experts_per_token, trace, replay};
  const auto generations = loaded.engine.generate(requests_of(request, flags.samples), on_text, &timings);
  for (const Generation& generation : generations) check_finished(generation);
  loaded.engine.finish_plan_trace();
  if (trace) save_trace(flags.routing, *generations[0].trace, loaded.engine, &tokenizer);
  save_prompt_cache(loaded.engine, generations[0], flags.prompt_cache);
  for (const Generation& generation : generations) {
    if (flags.json) {
      print_json(generation, flags, tokenizer, timings, loaded);
    } else {
      write_out((streams ? "" : generation.text) + "\n");
    }
  }
  if (flags.model.verbose || (stderr_is_terminal() && !flags.json)) print_stats(timings, loaded.seconds);
}

}  // namespace

void add_generate(CLI::App& app) {
  auto flags = std::make_shared<GenerateFlags>();
  flags->sampling.max_tokens = 128;
  CLI::App& command = *app.add_subcommand("generate", "Continue a text");
  add_prompt_flags(command, flags->prompt);
  flags->max_tokens = add_sampling_flags(command, flags->sampling);
  add_generation_config(command, flags->generation_config);
  CLI::Option* json = add_switch(command, "--json", flags->json, "One JSON object instead of a stream of text");
  add_option(command, "--logprobs", flags->sampling.logprobs,
             "With --json: log-probability of each token and of the N most likely")
      ->check(in_range(0, 20))
      ->needs(json);
  CLI::Option* prompt_logprobs = add_option(command, "--prompt-logprobs", flags->sampling.prompt_logprobs,
                                            "With --json: the same of the tokens of the prompt; null for the first")
                                     ->check(in_range(0, 20))
                                     ->needs(json);
  CLI::Option* samples =
      add_option(command, "--samples", flags->samples,
                 "Continue the prompt this many times, each with its own random numbers; with --json, a line each")
          ->check(at_least(1))
          ->capture_default_str();
  add_parse_special(command, flags->parse_special);
  CLI::Option* const cache = add_prompt_cache(command, flags->prompt_cache);
  add_routing_flags(command, flags->routing);
  for (const char* flag : {"--trace", "--replay"}) command.get_option(flag)->excludes(cache)->excludes(samples);
  for (CLI::Option* flag : {samples, prompt_logprobs}) cache->excludes(flag);
  CLI::Option* const plan_trace = add_option(command, "--plan-trace", flags->plan_trace,
                                             "Write what every forward pass computes and picks, for --plan-replay")
                                      ->type_name("FILE");
  add_option(command, "--plan-replay", flags->plan_replay,
             "The same command again: fail at the first pass that is not as in this file")
      ->type_name("FILE")
      ->excludes(plan_trace);
  add_model_flags(command, flags->model);
  add_loading_flags(command, flags->model);
  add_weights_flag(command, flags->model);
  add_mlock_flag(command, flags->model);
  add_offload_flags(command, flags->model);
  add_experts_flag(command, flags->model);
  add_rank_flags(command, flags->model);
  command.get_option("--experts-per-token")->excludes(cache);
  add_cuda_graph_flag(command, flags->model);
  add_speculate_flag(command, flags->model);
  add_kv_memory_flag(command, flags->model);
  command.footer(
      "Examples:\n"
      "  mixtral generate -p \"Once upon a time\" -n 64\n"
      "  mixtral generate ./Mixtral-8x7B-v0.1 -f prompt.txt --temp 0.8 --top-p 0.9 --seed 1\n"
      "  echo \"Once\" | mixtral generate --json --logprobs 5");
  command.callback([flags, &command] { run(command, *flags); });
}

}  // namespace mixtral::app
