// Commands that the Python package runs: the binary hands over to it.
#pragma once

#include <CLI/CLI.hpp>

namespace mixtral::app {

// Lists them in the help.
void add_python_commands(CLI::App& app);

// Where argv names one of them, this process becomes Python, with the same arguments, and does not return. Python is
// MIXTRAL_PYTHON, else that of .venv in the source tree, else the shell's python3. Throws std::runtime_error where
// there is none.
void hand_over_to_python(int argc, char** argv);

}  // namespace mixtral::app
