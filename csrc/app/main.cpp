// `mixtral <command> [MODEL] [flags]`: the program without Python.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "commands.h"
#include "errors.h"
#include "hints.h"
#include "library_exit.h"
#include "python.h"
#include "signals.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

void check_command(const CLI::App& app, int argc, char** argv) {
  const std::string see = " (see mixtral --help)";
  if (argc < 2) throw std::invalid_argument("a command is needed" + see);
  const std::string word = argv[1];
  if (word == "-m" || word == "--model" || word == "-p" || word == "--prompt") {
    throw std::invalid_argument("a command is needed before " + word + ", such as mixtral generate " + word + see);
  }
  if (word == "-h" || word == "--help" || word == "--version") return;
  if (word.rfind('-', 0) == 0) throw std::invalid_argument("a command is needed before " + word + see);
  if (word == "run") throw std::invalid_argument("unknown command run: use mixtral chat or mixtral generate" + see);
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands(nullptr)) names.push_back(command->get_name());
  if (std::find(names.begin(), names.end(), word) == names.end()) {
    throw std::invalid_argument("unknown command " + word + nearest_hint(word, names) + see);
  }
}

void run(int argc, char** argv) {
  CLI::App app("Mixtral on the command line: generate, chat, inspect, measure", "mixtral");
  app.set_version_flag("--version", "mixtral " MIXTRAL_VERSION " (torch " MIXTRAL_TORCH_VERSION ")",
                       "Print versions and exit");
  app.require_subcommand(1);
  app.get_formatter()->column_width(38);
  app.footer(
      "Without MODEL every command uses the bundled demo model. `mixtral COMMAND --help` shows examples.\n"
      "Exit codes: 0 ok, 2 usage, 3 bad model file, 4 out of memory, 5 run time, 130/143 interrupted.");
  add_generate(app);
  add_chat(app);
  add_info(app);
  add_tokenize(app);
  add_bench(app);
  add_quantize(app);
  add_convert(app);
  add_perplexity(app);
  add_passkey(app);
  add_reach(app);
  add_python_commands(app);
  check_command(app, argc, argv);
  try {
    app.parse(argc, argv);  // runs the command
  } catch (const CLI::CallForVersion& e) {
    write_out(std::string(e.what()) + "\n");
  } catch (const CLI::CallForHelp&) {
    const auto chosen = app.get_subcommands();
    write_out(chosen.empty() ? app.help() : chosen.front()->help("mixtral"));
  } catch (const CLI::ParseError& e) {
    const auto chosen = app.get_subcommands();
    const CLI::App& command = chosen.empty() ? app : *chosen.front();
    const std::string hint = foreign_flag_hint(command, {argv + 1, argv + argc});
    if (!hint.empty()) throw std::invalid_argument(hint);
    if (dynamic_cast<const CLI::ExtrasError*>(&e)) throw std::invalid_argument(unknown_argument(command));
    if (dynamic_cast<const CLI::ConversionError*>(&e)) throw std::invalid_argument(not_a_number(e.what()));
    throw;
  }
}

}  // namespace
}  // namespace mixtral::app

int main(int argc, char** argv) {
  try {
    mixtral::app::hand_over_to_python(argc, argv);
    mixtral::app::map_library_exits();
    mixtral::app::install_signal_handlers();
    mixtral::app::run(argc, argv);
    return mixtral::app::kOk;
  } catch (...) {
    return mixtral::app::report_exception();
  }
}
