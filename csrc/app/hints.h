// What to say about a command line that cannot be read: the nearest name, or what another program's flag is called
// here.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace mixtral::app {

// ", did you mean X?" for the nearest candidate, or nothing when none is near.
std::string nearest_hint(const std::string& word, const std::vector<std::string>& candidates);

// The flags that people know from llama.cpp, vLLM and transformers: the first one among the arguments that `command`
// does not have, with its name here. Empty when there is none.
std::string foreign_flag_hint(const CLI::App& command, const std::vector<std::string>& arguments);

// About an argument that `command` left over.
std::string unknown_argument(const CLI::App& command);

// From the parser's message about a value of the wrong type, which is always a number's: "Could not convert: --n = x".
std::string not_a_number(const std::string& message);

}  // namespace mixtral::app
