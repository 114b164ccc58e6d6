// The subcommands. Each function adds one: its flags, its help, and what it runs.
#pragma once

#include <CLI/CLI.hpp>

namespace mixtral::app {

void add_generate(CLI::App& app);
void add_chat(CLI::App& app);
void add_info(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_bench(CLI::App& app);
void add_quantize(CLI::App& app);
void add_convert(CLI::App& app);
void add_perplexity(CLI::App& app);
void add_passkey(CLI::App& app);
void add_reach(CLI::App& app);

}  // namespace mixtral::app
