// `mixtral passkey`: whether a model finds a number in a long text.
#include "../engine/passkey.h"

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "../checkpoint/config_reader.h"
#include "commands.h"
#include "figure.h"
#include "flags.h"
#include "load.h"
#include "ranks.h"
#include "report.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

struct PasskeyFlags {
  ModelFlags model;
  PasskeyOptions options;
  std::string style = "landmark";
  ResultFlags result;
};

std::string cells_text(const nlohmann::json& cells) {
  std::string text = "  length   depth  distance  found       share  95 % interval  log-prob of a digit\n";
  for (const auto& cell : cells) {
    char line[160];
    std::snprintf(line, sizeof line, "%8lld  %6.3f  %8lld  %3lld of %-4lld  %5.1f %%  %5.1f to %5.1f  %10.4f\n",
                  cell["length"].get<long long>(), cell["depth"].get<double>(), cell["distance"].get<long long>(),
                  cell["correct"].get<long long>(), cell["trials"].get<long long>(),
                  100 * cell["correct"].get<double>() / cell["trials"].get<double>(), 100 * cell["low"].get<double>(),
                  100 * cell["high"].get<double>(), cell["logprob"].get<double>());
    text += line;
  }
  return text;
}

std::string passkey_text(const nlohmann::json& result) {
  std::string text = cells_text(result["cells"]);
  if (!result["distances"].empty()) text += "\nby distance, the key first\n" + cells_text(result["distances"]);
  char line[160];
  std::snprintf(line, sizeof line, "\nk_max           %lld tokens: a fifth or more is found up to this distance\n",
                result["k_max"].get<long long>());
  text += line;
  std::snprintf(line, sizeof line, "chance          %g of keys, %.4f per digit\n", result["chance"].get<double>(),
                result["chance_logprob"].get<double>());
  text += line;
  if (result["reach"].is_number()) {
    text += "window          " + result["window"].dump() + ": beyond " + result["reach"].dump() +
            " tokens the key changes no bit\n";
  }
  return text;
}

void run(PasskeyFlags& flags) {
  follow_as_rank(flags.model);
  PasskeyOptions& options = flags.options;
  options.style = parse_passkey_style(flags.style);
  options.ctx_size = flags.model.ctx_size;
  options.chunk_size = flags.model.chunk_size;
  options.kv_memory = flags.model.kv_memory;
  const Config config = read_config(model_path(flags.model));
  const Tokenizer tokenizer = load_tokenizer(flags.model);
  check_passkey(config, tokenizer, options);
  check_figure(flags.result.svg);

  LoadedEngine loaded = load_idle_engine(flags.model, tokenizer);
  ProgressBar bar("asking", tokens_text);
  options.progress = progress_on(bar);
  const nlohmann::json result = to_json(passkey(loaded.engine.model(), tokenizer, options), config);
  write_result("passkey", result, passkey_text(result), flags.result);
}

}  // namespace

void add_passkey(CLI::App& app) {
  auto flags = std::make_shared<PasskeyFlags>();
  PasskeyOptions& options = flags->options;
  CLI::App& command =
      *app.add_subcommand("passkey", "Hide a number in a text, and see from how far the model finds it");
  add_option(command, "--lengths", options.lengths, "Lengths of the prompts in tokens, such as 128,256,512")
      ->delimiter(',')
      ->required();
  add_option(command, "--depths", options.depths, "Places of the key, evenly from the first to the last")
      ->check(at_least(1))
      ->capture_default_str();
  add_option(command, "--trials", options.trials, "Keys for each length and depth")
      ->check(at_least(1))
      ->capture_default_str();
  add_option(command, "--style", flags->style, "The prompt: landmark, or ruler (niah_single_1)")->capture_default_str();
  add_option(command, "--digits", options.digits, "Digits of a key; 0: 5 for landmark, 7 for ruler")
      ->check(in_range(0, 100))
      ->capture_default_str();
  add_option(command, "--distances", options.distances,
             "Distances of the key, evenly up to the longest length, that k_max is taken from; 0: those of the cells")
      ->check(at_least(0))
      ->capture_default_str();
  add_option(command, "-s,--seed", options.seed, "Of the keys")->capture_default_str();
  add_result_flags(command, flags->result);
  add_model_flags(command, flags->model);
  add_loading_flags(command, flags->model);
  add_kv_memory_flag(command, flags->model);
  add_rank_flags(command, flags->model);
  command.footer(
      "A key counts as found when the model's greedy answer has it, digit by digit: docs/long_context.md.\n\n"
      "Examples:\n"
      "  mixtral passkey --lengths 128,256,512 --trials 2\n"
      "  mixtral passkey ./Mixtral-8x7B-v0.1 --lengths 4096,8192,16384,32768 --depths 11 --trials 10 --svg "
      "passkey.svg");
  command.callback([flags] { run(*flags); });
}

}  // namespace mixtral::app
