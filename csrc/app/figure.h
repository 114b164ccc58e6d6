// Figures of results, drawn by the Python package (python/mixtral/figures.py) from the JSON that a command prints.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

namespace mixtral::app {

struct ResultFlags {
  std::string svg;  // empty: no figure
  bool json = false;
};
CLI::Option* add_svg_flag(CLI::App& app, ResultFlags& flags);
// --json and --svg.
void add_result_flags(CLI::App& app, ResultFlags& flags);

// Before long work: throws std::runtime_error, with what to install, where there is no Python that can draw, and
// std::invalid_argument where the file cannot be written. Nothing happens for an empty name.
void check_figure(const std::string& svg);
// Writes the result of a command ("perplexity", "passkey", "reach") to stdout, as JSON or as the text that it is for
// people, and draws it into the file, if one is named.
void write_result(const std::string& command, const nlohmann::json& result, const std::string& text,
                  const ResultFlags& flags);

}  // namespace mixtral::app
