// `mixtral generate`: one prompt in, streamed text or one JSON object out.
#include <algorithm>
#include <memory>
#include <stdexcept>

#include "../checkpoint/config_reader.h"
#include "commands.h"
#include "flags.h"
#include "load.h"
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
  std::string prompt_cache;  // a file
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

nlohmann::json logprobs_json(const std::vector<TokenLogprob>& logprobs, const Tokenizer& tokenizer) {
  nlohmann::json list = nlohmann::json::array();
  for (const TokenLogprob& chosen : logprobs) {
    nlohmann::json top = nlohmann::json::array();
    for (const auto& [id, logprob] : chosen.top) {
      top.push_back({{"token_id", id}, {"piece", tokenizer.piece(id)}, {"logprob", logprob}});
    }
    list.push_back({{"token_id", chosen.token_id},
                    {"piece", tokenizer.piece(chosen.token_id)},
                    {"logprob", chosen.logprob},
                    {"top", top}});
  }
  return list;
}

nlohmann::json timings_json(const Timings& timings, double load_seconds) {
  return {{"load_seconds", load_seconds},
          {"prompt_tokens", timings.prompt_tokens},
          {"cached_tokens", timings.cached_tokens},
          {"prefill_seconds", timings.prefill_seconds},
          {"prefill_tokens_per_second", prefill_rate(timings)},
          {"new_tokens", timings.new_tokens},
          {"decode_seconds", timings.decode_seconds},
          {"decode_tokens_per_second", per_second(decoded_tokens(timings, 1), timings.decode_seconds)},
          {"drafted_tokens", timings.drafted_tokens},
          {"accepted_tokens", timings.accepted_tokens},
          {"peak_pages", timings.peak_pages}};
}

void print_json(const Generation& generation, const GenerateFlags& flags, const Tokenizer& tokenizer,
                const Timings& timings, double load_seconds) {
  nlohmann::json result = {{"text", generation.text},
                           {"prompt_token_ids", generation.prompt_token_ids},
                           {"token_ids", generation.token_ids},
                           {"finish_reason", generation.finish_reason},
                           {"timings", timings_json(timings, load_seconds)}};
  if (flags.sampling.logprobs > 0) result["logprobs"] = logprobs_json(generation.logprobs, tokenizer);
  write_out(json_line(result));
}

void run(const CLI::App& command, GenerateFlags flags) {
  if (flags.generation_config) use_generation_config(command, model_path(flags.model), flags.sampling);
  flags.sampling.validate();
  const std::string prompt = read_prompt(flags.prompt);
  const std::filesystem::path folder = model_path(flags.model);
  const Config config = read_config(folder);
  const Tokenizer tokenizer = load_tokenizer(flags.model);
  const std::vector<int64_t> ids = tokenizer.encode(prompt, /*add_bos=*/true, /*add_eos=*/false, flags.parse_special);
  flags.sampling.max_tokens = new_tokens(flags, static_cast<int64_t>(ids.size()), context_of(flags.model, config));

  const std::shared_ptr<const Trace> replay = read_replay(flags.routing);
  LoadedEngine loaded = load_engine(flags.model, tokenizer);
  check_replay(flags.routing, replay, loaded.engine);
  if (!flags.json && stdout_is_terminal()) write_out("\x1b[2m" + prompt + "\x1b[0m");
  const auto on_text = [&flags](size_t, const std::string& piece) {
    if (!flags.json && pending_signal() == 0) write_out(piece);
    return pending_signal() == 0;
  };
  load_prompt_cache(loaded.engine, flags.prompt_cache);
  Timings timings;
  const bool trace = !flags.routing.trace.empty();
  const Request request = {ids, flags.sampling, flags.prompt_cache, flags.model.experts_per_token, trace, replay};
  const Generation generation = loaded.engine.generate({request}, on_text, &timings).front();
  check_finished(generation);
  if (trace) save_trace(flags.routing, *generation.trace, loaded.engine, tokenizer);
  save_prompt_cache(loaded.engine, flags.prompt_cache);
  if (flags.json) {
    print_json(generation, flags, tokenizer, timings, loaded.seconds);
  } else {
    write_out("\n");
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
  add_parse_special(command, flags->parse_special);
  CLI::Option* const cache = add_prompt_cache(command, flags->prompt_cache);
  add_routing_flags(command, flags->routing);
  for (const char* flag : {"--trace", "--replay"}) command.get_option(flag)->excludes(cache);
  add_model_flags(command, flags->model);
  add_loading_flags(command, flags->model);
  add_experts_flag(command, flags->model);
  add_cuda_graph_flag(command, flags->model);
  add_speculate_flag(command, flags->model);
  command.footer(
      "Examples:\n"
      "  mixtral generate -p \"Once upon a time\" -n 64\n"
      "  mixtral generate ./Mixtral-8x7B-v0.1 -f prompt.txt --temp 0.8 --top-p 0.9 --seed 1\n"
      "  echo \"Once\" | mixtral generate --json --logprobs 5");
  command.callback([flags, &command] { run(command, *flags); });
}

}  // namespace mixtral::app
