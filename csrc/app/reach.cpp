// `mixtral reach`: how far a model looks back.
#include "../engine/reach.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "figure.h"
#include "flags.h"
#include "load.h"
#include "report.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

struct ReachFlags {
  ModelFlags model;
  ReachOptions options;
  ResultFlags result;
};

// The mean share in [begin, end) and the text of a line about it.
std::string band(const std::vector<double>& changed, size_t begin, size_t end, const std::string& name) {
  end = std::min(end, changed.size());
  if (begin >= end) return "";
  double sum = 0;
  for (size_t d = begin; d < end; ++d) sum += changed[d];
  char line[160];
  std::snprintf(line, sizeof line, "%-34s %6.2f %% of outputs change\n", name.c_str(),
                100 * sum / static_cast<double>(end - begin));
  return line;
}

std::string to_text(const Reach& reach) {
  std::string text = "window    " + (reach.window > 0 ? std::to_string(reach.window) + " keys" : "none") + ", " +
                     std::to_string(reach.layers) + " layers\n";
  if (!reach.field) {
    return text + "reach     every token\n\n" + band(reach.changed, 0, reach.changed.size(), "all distances measured");
  }
  const auto window = static_cast<size_t>(reach.window);
  text += "reach     " + std::to_string(*reach.field) + " tokens = layers * (window - 1)\n\n";
  for (int64_t layer = 1; layer <= reach.layers; ++layer) {
    const size_t begin = static_cast<size_t>(layer - 1) * (window - 1) + (layer > 1 ? 1 : 0);
    const size_t end = static_cast<size_t>(layer) * (window - 1);
    text += band(reach.changed, begin, end + 1, "distance " + std::to_string(begin) + " to " + std::to_string(end));
  }
  text += band(reach.changed, static_cast<size_t>(*reach.field) + 1, reach.changed.size(), "beyond") + "\n";
  for (const auto& [way, distance] : reach.farthest)
    text += "farthest output that changed, " + way + ": " + std::to_string(distance) + "\n";
  return text;
}

void run(ReachFlags& flags) {
  check_figure(flags.result.svg);
  LoadedEngine loaded = load_idle_engine(flags.model, std::nullopt);
  flags.options.ctx_size = flags.model.ctx_size;
  ProgressBar bar("measuring", tokens_text);
  flags.options.progress = progress_on(bar);
  const Reach reach = measure_reach(loaded.engine.model(), flags.options);
  write_result("reach", to_json(reach), to_text(reach), flags.result);
}

}  // namespace

void add_reach(CLI::App& app) {
  auto flags = std::make_shared<ReachFlags>();
  flags->model.dtype = "float32";  // in bf16 small changes are lost in the rounding
  CLI::App& command = *app.add_subcommand("reach", "Measure how far back a token can change an output");
  add_option(command, "--trials", flags->options.trials, "Random texts, in each of which one token is replaced")
      ->check(at_least(1))
      ->capture_default_str();
  add_option(command, "-s,--seed", flags->options.seed, "Of the texts")->capture_default_str();
  add_result_flags(command, flags->result);
  add_model_flags(command, flags->model);
  add_loading_flags(command, flags->model);
  command.footer(
      "An output changes when one of its bits does. How windows add up over layers: docs/attention.md.\n\n"
      "Examples:\n"
      "  mixtral reach\n"
      "  mixtral reach ./Mistral-7B-v0.1 -c 16384 --svg reach.svg");
  command.callback([flags] { run(*flags); });
}

}  // namespace mixtral::app
