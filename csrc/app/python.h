// The Python beside the binary: it draws figures and runs some of the commands.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace mixtral::app {

// The Python that has, or may have, the package: that which started this program (MIXTRAL_PYTHON, set by
// python/mixtral/__main__.py), else that of the source tree's environment, else the shell's.
std::string python_program();

// Lists the commands of Python in the help.
void add_python_commands(CLI::App& app);

// Where argv names one of them, this process becomes Python, with the same arguments, and does not return. Throws
// std::runtime_error where there is no Python.
void hand_over_to_python(int argc, char** argv);

}  // namespace mixtral::app
