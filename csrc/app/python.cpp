#include "python.h"

#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace mixtral::app {
namespace {

struct PythonCommand {
  const char* name;
  const char* help;
};

// As COMMANDS in python/mixtral/__main__.py.
constexpr PythonCommand kPythonCommands[] = {
    {"serve", "Serve a model over HTTP, as OpenAI's clients expect it (Python)"},
    {"route", "Analyse what the router does with texts (Python)"},
    {"train", "Train a model from text, by a configuration in TOML (Python)"},
    {"upcycle", "Make a mixture of experts of a dense model, with the same logits (Python)"},
    {"distill", "Train a small model to imitate a large one (Python)"},
    {"finetune", "Train LoRA adapters or a whole model on conversations (Python)"},
};

// `python -m mixtral`, but one line instead of a traceback where the package is not installed.
constexpr const char* kProgram = R"(import sys
try:
    from mixtral.__main__ import main
except ImportError:
    extra = {"route": "routing", "serve": "serve"}.get(sys.argv[1], "train")
    print(f"mixtral: {sys.argv[1]} runs in Python, and {sys.executable} has no mixtral package: run scripts/setup.sh, "
          f"or pip install 'mixtral[{extra}]' and name that Python in MIXTRAL_PYTHON", file=sys.stderr)
    sys.exit(5)
main())";

}  // namespace

std::string python_program() {
  if (const char* const named = std::getenv("MIXTRAL_PYTHON")) return named;
  const char* const of_tree = MIXTRAL_SOURCE_DIR "/.venv/bin/python";
  return ::access(of_tree, X_OK) == 0 ? of_tree : "python3";
}

void add_python_commands(CLI::App& app) {
  for (const PythonCommand& command : kPythonCommands) app.add_subcommand(command.name, command.help);
}

void hand_over_to_python(int argc, char** argv) {
  const std::string word = argc > 1 ? argv[1] : "";
  for (const PythonCommand& command : kPythonCommands) {
    if (word != command.name) continue;
    const std::string python = python_program();
    std::vector<const char*> arguments = {python.c_str(), "-c", kProgram};
    arguments.insert(arguments.end(), argv + 1, argv + argc);
    arguments.push_back(nullptr);
    ::execvp(python.c_str(), const_cast<char**>(arguments.data()));
    throw std::runtime_error(word + " runs in Python, and " + python +
                             " cannot be started: install python3, or name another one in MIXTRAL_PYTHON");
  }
}

}  // namespace mixtral::app
