// `mixtral perplexity --contexts`: the loss by length of the context.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "figure.h"
#include "flags.h"

namespace mixtral::app {

struct ContextFlags {
  std::vector<int64_t> contexts;  // empty: the plain perplexity of the text
  std::string protocol = "fixed";
  std::string targets;  // empty: parse_targets decides
  int64_t document_tokens = 0;
  bool window_means = false;
  ResultFlags result;
  std::vector<CLI::Option*> need_contexts;  // options that mean nothing without --contexts
};

// The text to score. Throws std::invalid_argument for a file that cannot be read or is binary.
std::string read_text(const std::string& file);
void add_context_flags(CLI::App& command, ContextFlags& flags);
void run_contexts(const ModelFlags& model, const ContextFlags& flags, const std::string& file);

}  // namespace mixtral::app
