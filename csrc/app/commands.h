// The subcommands, and the flags and steps they share.
#pragma once

#include <mixtral/mixtral.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "console.h"

namespace mixtral::app {

// Each adds one subcommand: its flags, its help, and what it runs.
void add_generate(CLI::App& app);
void add_chat(CLI::App& app);
void add_info(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_bench(CLI::App& app);
void add_quantize(CLI::App& app);
void add_perplexity(CLI::App& app);

struct ModelFlags {
  std::string model;  // empty: the demo model
  std::string device = "cpu";
  std::string dtype = "auto";
  int64_t threads = 0;   // 0: torch decides
  int64_t ctx_size = 0;  // 0: the model's
  int64_t chunk_size = kChunkSize;
  bool verbose = false;
  bool no_cuda_graph = false;
};

struct PromptFlags {
  std::string text, file;
  CLI::Option* text_option = nullptr;
  CLI::Option* file_option = nullptr;
};

constexpr const char* kModelPathNames = "MODEL,-m,--model";  // as an argument or a flag
void add_model_path(CLI::App& app, ModelFlags& flags, const std::string& names = kModelPathNames);
void add_model_flags(CLI::App& app, ModelFlags& flags, const std::string& path_names = kModelPathNames);
void add_cuda_graph_flag(CLI::App& app, ModelFlags& flags);
CLI::Option* add_dtype(CLI::App& app, const std::string& name, std::string& dtype, const std::string& help);
void add_sampling_flags(CLI::App& app, SamplingParams& params);
void add_prompt_flags(CLI::App& app, PromptFlags& flags);

// Adds an option or flag that may also come from the environment: --max-tokens from MIXTRAL_MAX_TOKENS.
template <typename T>
CLI::Option* add_option(CLI::App& app, const std::string& names, T& value, const std::string& help);
CLI::Option* add_switch(CLI::App& app, const std::string& names, bool& value, const std::string& help);
std::string environment_name(const CLI::Option& option);

// The bytes of a file. Throws std::invalid_argument.
std::string read_file(const std::string& path);
// From -p, -f or stdin; of the last two one final newline is dropped. Throws std::invalid_argument when it is empty.
std::string read_prompt(const PromptFlags& flags);
// The folder given, or the demo model's.
std::filesystem::path model_path(const ModelFlags& flags);
WeightType weight_type_of(const ModelFlags& flags, const Config& config);
int64_t context_of(const ModelFlags& flags, const Config& config);

struct LoadedEngine {
  Engine engine;
  double seconds;  // it took to load
};
// Reads the weights, with a progress bar on a terminal when that takes long. Chunk and context size come from `flags`.
LoadedEngine load_engine(const ModelFlags& flags, std::optional<Tokenizer> tokenizer, Engine::Options options = {});
// Throws when generation was interrupted or `generation` ended in an error.
void check_finished(const Generation& generation);

double per_second(int64_t count, double seconds);
int64_t decoded_tokens(const Timings& timings, size_t sequences);  // the first token of each comes from the prefill
void print_stats(const Timings& timings, double load_seconds);     // one line on stderr
std::string json_line(const nlohmann::json& value);

template <typename T>
CLI::Option* add_option(CLI::App& app, const std::string& names, T& value, const std::string& help) {
  CLI::Option* option = app.add_option(names, value, help);
  return option->envname(environment_name(*option));
}

}  // namespace mixtral::app
