// The flags that several subcommands share.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <string>

#include "../engine/sampling.h"
#include "../model/defaults.h"

namespace mixtral::app {

// How the model is split over processes (model/placement.h).
struct ParallelFlags {
  int tensor_size = 1, stages = 1;
  bool expert_parallel = true;
};

struct ModelFlags {
  std::string model;  // empty: the demo model
  std::string device = "cpu";
  std::string dtype = "auto";
  int64_t threads = 0;   // 0: torch decides
  int64_t ctx_size = 0;  // 0: the model's
  int64_t chunk_size = kChunkSize;
  std::string lora;  // folder of an adapter; empty: none
  bool check_weights = false;
  int64_t experts_per_token = 0;  // 0: as many as the checkpoint says
  std::string weights = "read";
  int64_t gpu_memory = 0;  // bytes; 0: all weights are on the device
  bool mlock = false;
  std::string routing_counts;
  bool simulate_gpu = false;
  bool verbose = false;
  bool no_cuda_graph = false;
  int64_t speculate = 0;
  int64_t kv_memory = 0;  // bytes; 0: as much as is needed
  ParallelFlags parallel;
  std::string parallel_backend = "auto";
  int64_t rank_timeout = 30;  // seconds
};

struct RoutingFlags {
  std::string trace, replay;  // files; empty: none
};

struct PromptFlags {
  std::string text, file;
  bool escape = false;  // \n and the like in `text` stand for characters
  CLI::Option* text_option = nullptr;
  CLI::Option* file_option = nullptr;
};

constexpr const char* kModelPathNames = "MODEL,-m,--model";  // as an argument or a flag
void add_model_path(CLI::App& app, ModelFlags& flags, const std::string& names = kModelPathNames);
void add_model_flags(CLI::App& app, ModelFlags& flags, const std::string& path_names = kModelPathNames);
void add_cuda_graph_flag(CLI::App& app, ModelFlags& flags);
void add_speculate_flag(CLI::App& app, ModelFlags& flags);
void add_kv_memory_flag(CLI::App& app, ModelFlags& flags);
void add_experts_flag(CLI::App& app, ModelFlags& flags);
// --tensor-parallel-size, --pipeline-parallel-size and --expert-parallel.
void add_parallel_flags(CLI::App& app, ParallelFlags& flags);
// These, --parallel-backend and --rank-timeout.
void add_rank_flags(CLI::App& app, ModelFlags& flags);
// --trace and --replay.
void add_routing_flags(CLI::App& app, RoutingFlags& flags);
void add_loading_flags(CLI::App& app, ModelFlags& flags);
void add_weights_flag(CLI::App& app, ModelFlags& flags);
void add_mlock_flag(CLI::App& app, ModelFlags& flags);
// --gpu-memory, --routing-counts and --simulate-gpu.
void add_offload_flags(CLI::App& app, ModelFlags& flags);
CLI::Option* add_dtype(CLI::App& app, const std::string& name, std::string& dtype, const std::string& help);
// Returns the option of params.max_tokens.
CLI::Option* add_sampling_flags(CLI::App& app, SamplingParams& params);
// --chat-template: a name or a file; empty: the model's own.
CLI::Option* add_chat_template(CLI::App& app, std::string& chat_template);
// --generation-config: sample as generation_config.json says, but for the flags that are given.
void add_generation_config(CLI::App& app, bool& wanted);
void use_generation_config(const CLI::App& app, const std::filesystem::path& folder, SamplingParams& params);
void add_prompt_flags(CLI::App& app, PromptFlags& flags);
CLI::Option* add_prompt_cache(CLI::App& app, std::string& file);
CLI::Option* add_parse_special(CLI::App& app, bool& parse_special);

// Reads the prompt from -p, -f or stdin; of the last two one final newline is dropped. Throws std::invalid_argument
// when it is empty.
std::string read_prompt(const PromptFlags& flags);

// Checks of numbers, with a message like that of every other argument: "--threads: must be in [0, 4096], got -1".
CLI::Validator in_range(int64_t least, int64_t most);
CLI::Validator at_least(int64_t least);

// Adds an option or flag that may also come from the environment: --max-tokens from MIXTRAL_MAX_TOKENS.
template <typename T>
CLI::Option* add_option(CLI::App& app, const std::string& names, T& value, const std::string& help);
CLI::Option* add_switch(CLI::App& app, const std::string& names, bool& value, const std::string& help);
std::string environment_name(const CLI::Option& option);

template <typename T>
CLI::Option* add_option(CLI::App& app, const std::string& names, T& value, const std::string& help) {
  CLI::Option* option = app.add_option(names, value, help);
  return option->envname(environment_name(*option));
}

}  // namespace mixtral::app
