#include "flags.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <limits>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../checkpoint/generation_config.h"
#include "../io/size.h"
#include "load.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

std::optional<uint64_t> parse_seed(const std::string& text) {
  if (text == "-1") return std::nullopt;
  uint64_t seed = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seed);
  if (error != std::errc() || end != text.data() + text.size()) {
    throw std::invalid_argument("--seed must be -1 or in [0, 2^64), got " + text);
  }
  return seed;
}

// "42=-1.5": a token id and what is added to its logit.
std::pair<int64_t, double> parse_bias(const std::string& text) {
  const size_t separator = text.find('=');
  std::pair<int64_t, double> bias;
  if (separator == std::string::npos || !CLI::detail::lexical_cast(text.substr(0, separator), bias.first) ||
      !CLI::detail::lexical_cast(text.substr(separator + 1), bias.second)) {
    throw std::invalid_argument("--logit-bias must be ID=BIAS, for example 42=-100, got " + text);
  }
  return bias;
}

// A number within bounds; `rule` describes them. What is no number is left to the conversion, which comes later.
CLI::Validator within(int64_t least, int64_t most, const std::string& rule) {
  const auto check = [=](const std::string& text) {
    int64_t value = 0;
    const bool is_number = CLI::detail::lexical_cast(text, value);
    return is_number && (value < least || value > most) ? "must be " + rule + ", got " + text : std::string();
  };
  return CLI::Validator(check, "");
}

void add_size(CLI::App& app, const std::string& names, int64_t& bytes, const std::string& help) {
  const auto to_bytes = [](std::string& text) -> std::string {
    try {
      text = std::to_string(parse_size(text));
      return "";
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
  };
  add_option(app, names, bytes, help)->transform(CLI::Validator(to_bytes, ""))->type_name("SIZE");
}

}  // namespace

CLI::Validator in_range(int64_t least, int64_t most) {
  return within(least, most, "in [" + std::to_string(least) + ", " + std::to_string(most) + "]");
}

CLI::Validator at_least(int64_t least) {
  return within(least, std::numeric_limits<int64_t>::max(), ">= " + std::to_string(least));
}

std::string environment_name(const CLI::Option& option) {
  std::string name = "MIXTRAL_" + option.get_lnames().front();
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return c == '-' ? '_' : static_cast<char>(std::toupper(c)); });
  return name;
}

CLI::Option* add_switch(CLI::App& app, const std::string& names, bool& value, const std::string& help) {
  CLI::Option* option = app.add_flag(names, value, help);
  return option->envname(environment_name(*option));
}

CLI::Option* add_dtype(CLI::App& app, const std::string& name, std::string& dtype, const std::string& help) {
  return add_option(app, name, dtype, help)
      ->check(CLI::IsMember({"auto", "float32", "bfloat16", "float16", "int8", "fp8", "int4"}));
}

void add_model_path(CLI::App& app, ModelFlags& flags, const std::string& names) {
  add_option(
      app, names, flags.model,
      "Folder of the checkpoint, .gguf file, or org/name in the Hugging Face cache; without it, the bundled demo model")
      ->type_name("FOLDER");
}

void add_loading_flags(CLI::App& app, ModelFlags& flags) {
  add_option(app, "--lora", flags.lora, "Adapter of PEFT or mistral-finetune to merge into the weights")
      ->type_name("FOLDER");
  add_switch(app, "--check-weights", flags.check_weights, "Fail at a weight that is NaN or infinite");
}

void add_weights_flag(CLI::App& app, ModelFlags& flags) {
  add_option(app, "--weights", flags.weights,
             "mmap: take the weights from the files as they are used, for a model larger than memory that `mixtral "
             "quantize` wrote; direct: read them past the memory of the system")
      ->check(CLI::IsMember({"read", "direct", "mmap"}))
      ->capture_default_str();
}

void add_mlock_flag(CLI::App& app, ModelFlags& flags) {
  add_switch(app, "--mlock", flags.mlock, "Keep the weights in memory: the system never swaps or drops them");
}

void add_offload_flags(CLI::App& app, ModelFlags& flags) {
  add_size(app, "--gpu-memory", flags.gpu_memory,
           "Of the GPU for weights, such as 20GiB: experts beyond it stay in the memory of the CPU");
  add_option(app, "--routing-counts", flags.routing_counts,
             "With --gpu-memory: keep the experts there that these counts, as of `mixtral route --counts`, use most")
      ->type_name("FILE");
  add_switch(app, "--simulate-gpu", flags.simulate_gpu,
             "With --gpu-memory: memory of the CPU in the place of a GPU's, to test and to measure without one");
}

void add_model_flags(CLI::App& app, ModelFlags& flags, const std::string& path_names) {
  add_model_path(app, flags, path_names);
  add_option(app, "--device", flags.device, "Where to compute")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  add_dtype(app, "--dtype", flags.dtype, "Type of the weights; auto: the checkpoint's")->capture_default_str();
  add_option(app, "-t,--threads", flags.threads, "CPU threads; 0: one per core")
      ->check(in_range(0, 4096))
      ->capture_default_str();
  add_option(app, "-c,--ctx-size", flags.ctx_size, "Longest prompt plus new tokens; 0: the model's")
      ->check(at_least(0))
      ->capture_default_str();
  add_option(app, "--chunk-size", flags.chunk_size, "Prompt tokens per forward pass")
      ->check(at_least(1))
      ->capture_default_str();
  add_switch(app, "-v,--verbose", flags.verbose, "Timings on stderr, even when it is not a terminal");
}

void add_cuda_graph_flag(CLI::App& app, ModelFlags& flags) {
  add_switch(app, "--no-cuda-graph", flags.no_cuda_graph, "On CUDA, launch the kernels of a decoding step one by one");
}

void add_speculate_flag(CLI::App& app, ModelFlags& flags) {
  add_option(app, "--speculate", flags.speculate,
             "Guess up to N tokens per step from earlier text that ends alike; changes the speed alone")
      ->check(at_least(0))
      ->capture_default_str();
}

void add_kv_memory_flag(CLI::App& app, ModelFlags& flags) {
  add_size(app, "--kv-memory", flags.kv_memory,
           "Of the key/value cache, such as 4GiB: what does not fit it is refused; without it, as much as is needed");
}

void add_experts_flag(CLI::App& app, ModelFlags& flags) {
  add_option(app, "--experts-per-token", flags.experts_per_token, "Another number of experts than the checkpoint's")
      ->check(at_least(1));
}

void add_parallel_flags(CLI::App& app, ParallelFlags& flags) {
  add_option(app, "--tensor-parallel-size,--tp", flags.tensor_size, "Processes that share the matrices of each layer")
      ->check(in_range(1, 4096))
      ->capture_default_str();
  add_option(app, "--pipeline-parallel-size,--pp", flags.stages, "Runs of layers, each in processes of its own")
      ->check(in_range(1, 4096))
      ->capture_default_str();
  add_switch(app, "--expert-parallel,!--no-expert-parallel", flags.expert_parallel,
             "Each process holds whole experts, for the bits of one process; else a part of each, for even work");
}

void add_rank_flags(CLI::App& app, ModelFlags& flags) {
  add_parallel_flags(app, flags.parallel);
  add_option(app, "--parallel-backend", flags.parallel_backend,
             "How these processes speak: shm (one host), gloo (TCP), nccl (GPUs); auto: what fits")
      ->check(CLI::IsMember({"auto", "shm", "gloo", "nccl"}))
      ->capture_default_str();
  add_option(app, "--rank-timeout", flags.rank_timeout, "Seconds that one may be silent while another waits for it")
      ->check(in_range(1, 86400))
      ->capture_default_str();
}

void add_routing_flags(CLI::App& app, RoutingFlags& flags) {
  add_option(app, "--trace", flags.trace, "Write which experts each token went to, for --replay and for analyses")
      ->type_name("FILE");
  add_option(app, "--replay", flags.replay, "Send each token to the experts of this trace, which is of the same text")
      ->type_name("FILE");
}

CLI::Option* add_sampling_flags(CLI::App& app, SamplingParams& params) {
  CLI::Option* const max_tokens =
      add_option(app, "-n,--max-tokens", params.max_tokens, "Most new tokens; without it, fewer where the context ends")
          ->capture_default_str();
  add_option(app, "--temperature,--temp", params.temperature, "0: always the most likely token")->capture_default_str();
  add_option(app, "--top-p", params.top_p, "Keep the likeliest tokens that make up this probability")
      ->capture_default_str();
  add_option(app, "--top-k", params.top_k, "Keep this many of the likeliest tokens; 0: all")->capture_default_str();
  add_option(app, "--min-p", params.min_p, "Drop tokens less likely than this times the likeliest")
      ->capture_default_str();
  add_option(app, "--repetition-penalty", params.repetition_penalty, "Above 1: fewer repetitions")
      ->capture_default_str();
  add_option(app, "--presence-penalty", params.presence_penalty,
             "From -2 to 2: above 0, tokens that were generated become less likely")
      ->capture_default_str();
  add_option(app, "--frequency-penalty", params.frequency_penalty, "The same, once for each time they were generated")
      ->capture_default_str();
  CLI::Option* const bias = app.add_option_function<std::vector<std::string>>(
      "--logit-bias",
      [&params](const std::vector<std::string>& texts) {
        for (const std::string& text : texts) params.logit_bias.insert(parse_bias(text));
      },
      "Add -100 to 100 to the logit of a token: 42=-100 for never, 42=5 for more often");
  bias->type_name("ID=BIAS,...")->envname(environment_name(*bias))->delimiter(',')->allow_extra_args(false);
  CLI::Option* const seed = app.add_option_function<std::string>(
      "-s,--seed", [&params](const std::string& text) { params.seed = parse_seed(text); },
      "Of the random numbers; without it or with -1, a new one each time");
  seed->type_name("UINT")->envname(environment_name(*seed));
  add_option(app, "--stop", params.stop,
             "Stop before this text, in which \\n is a new line; may be given several times")
      ->transform([](const std::string& text) { return unescape(text); })
      ->take_all()
      ->allow_extra_args(false);
  add_option(app, "--stop-token-ids", params.stop_token_ids, "Stop at these tokens too")
      ->type_name("ID,...")
      ->delimiter(',')
      ->allow_extra_args(false);
  add_option(app, "--min-tokens", params.min_tokens, "Do not stop before this many new tokens")->capture_default_str();
  add_switch(app, "--ignore-eos", params.ignore_eos, "Go on after the end-of-sequence token");
  return max_tokens;
}

CLI::Option* add_prompt_cache(CLI::App& app, std::string& file) {
  return add_option(app, "--prompt-cache", file,
                    "Keep keys and values in this file, and compute only what it does not have; made if there is none")
      ->type_name("FILE");
}

CLI::Option* add_chat_template(CLI::App& app, std::string& chat_template) {
  return add_option(
             app, "--chat-template", chat_template,
             "Instead of the model's own: a file, mistral-v1, -v2, -v3, -v7, chatml, zephyr, llama-2, alpaca, vicuna")
      ->type_name("NAME|FILE");
}

void add_generation_config(CLI::App& app, bool& wanted) {
  add_switch(app, "--generation-config", wanted,
             "Sample as the model's generation_config.json says; other flags go before it");
}

void use_generation_config(const CLI::App& app, const std::filesystem::path& folder, SamplingParams& params) {
  const GenerationConfig config = read_generation_config(folder);
  const auto use = [&app](const char* flag, const auto& value, auto& field) {
    if (value && app.get_option(flag)->count() == 0) field = *value;
  };
  use("--temperature", config.effective_temperature(), params.temperature);
  use("--top-p", config.top_p, params.top_p);
  use("--top-k", config.top_k, params.top_k);
  use("--min-p", config.min_p, params.min_p);
  use("--repetition-penalty", config.repetition_penalty, params.repetition_penalty);
  for (const std::string& key : config.unsupported) {
    warn("generation_config.json: " + key + " is not supported and not used");
  }
}

CLI::Option* add_parse_special(CLI::App& app, bool& parse_special) {
  return add_switch(app, "--parse-special", parse_special, "Read control tokens written in the prompt, such as </s>");
}

void add_prompt_flags(CLI::App& app, PromptFlags& flags) {
  flags.text_option = app.add_option("-p,--prompt", flags.text, "The prompt");
  flags.file_option = app.add_option("-f,--file", flags.file, "Read the prompt from a file; without both, from stdin")
                          ->excludes(flags.text_option);
  add_switch(app, "-e,--escape", flags.escape, "In -p, \\n, \\t, \\r, \\\\ and \\\" stand for characters");
}

std::string read_prompt(const PromptFlags& flags) {
  std::string text = flags.escape ? unescape(flags.text) : flags.text;
  if (flags.text_option->count() == 0) {
    if (flags.file_option->count() == 0 && stdin_is_terminal()) {
      throw std::invalid_argument("no prompt: give -p TEXT or -f FILE, or pipe it in");
    }
    text = flags.file_option->count() > 0 ? read_file(flags.file) : read_stdin();
    if (!text.empty() && text.back() == '\n') text.pop_back();
  }
  if (text.empty()) throw std::invalid_argument("prompt must not be empty");
  return text;
}

}  // namespace mixtral::app
