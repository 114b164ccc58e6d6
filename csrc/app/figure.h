// Figures of results, drawn by the Python package (python/mixtral/figures.py) from the JSON that a command prints.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace mixtral::app {

// Before long work: throws std::runtime_error, with what to install, where there is no Python that can draw, and
// std::invalid_argument where the file cannot be written. Nothing happens for an empty name.
void check_figure(const std::string& svg);
// Draws `result` of a command ("perplexity", "passkey", "reach") into the file.
void draw_figure(const std::string& command, const nlohmann::json& result, const std::string& svg);

}  // namespace mixtral::app
