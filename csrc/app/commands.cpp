#include "commands.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <future>

namespace mixtral::app {
namespace {

std::filesystem::path demo_model() {
  if (const char* folder = std::getenv("MIXTRAL_DEMO_MODEL")) return folder;
  const std::filesystem::path bin = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  // In the Python package, in the build folder of the source tree, and in a build folder elsewhere.
  for (const std::filesystem::path& folder :
       {bin / "../models/demo", bin / "../../models/demo", std::filesystem::path(MIXTRAL_SOURCE_DIR) / "models/demo"}) {
    if (std::filesystem::exists(folder / "config.json")) return std::filesystem::canonical(folder);
  }
  throw std::invalid_argument("no MODEL given, and the demo model is not installed: name a model folder");
}

std::string read_all(int fd, const std::string& name) {
  std::string text;
  char buffer[65536];
  for (;;) {
    const ssize_t count = ::read(fd, buffer, sizeof buffer);
    if (count == 0) return text;
    throw_if_terminated();
    if (count > 0) {
      text.append(buffer, static_cast<size_t>(count));
    } else if (errno != EINTR) {
      throw std::invalid_argument("cannot read " + name + ": " + std::generic_category().message(errno));
    }
  }
}

// torch waits for ever for threads of its pool that the system would not start, so all are tried first.
void set_threads(int64_t count) {
  {
    std::vector<std::future<void>> threads;
    std::promise<void> gate;  // destroyed before them: that lets them go
    const std::shared_future<void> open = gate.get_future().share();
    for (int64_t i = 0; i < count; ++i) threads.push_back(std::async(std::launch::async, [open] { open.wait(); }));
  }
  at::set_num_threads(static_cast<int>(count));
}

}  // namespace

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
  add_option(app, names, flags.model, "Folder of the checkpoint; without it, the bundled demo model")
      ->type_name("FOLDER");
}

void add_model_flags(CLI::App& app, ModelFlags& flags, const std::string& path_names) {
  add_model_path(app, flags, path_names);
  add_option(app, "--device", flags.device, "Where to compute")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  add_dtype(app, "--dtype", flags.dtype, "Type of the weights; auto: the checkpoint's")->capture_default_str();
  add_option(app, "-t,--threads", flags.threads, "CPU threads; 0: one per core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  add_option(app, "-c,--ctx-size", flags.ctx_size, "Longest prompt plus new tokens; 0: the model's")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  add_option(app, "--chunk-size", flags.chunk_size, "Prompt tokens per forward pass")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  add_switch(app, "-v,--verbose", flags.verbose, "Timings on stderr, even when it is not a terminal");
}

void add_cuda_graph_flag(CLI::App& app, ModelFlags& flags) {
  add_switch(app, "--no-cuda-graph", flags.no_cuda_graph, "On CUDA, launch the kernels of a decoding step one by one");
}

void add_sampling_flags(CLI::App& app, SamplingParams& params) {
  add_option(app, "-n,--max-tokens", params.max_tokens, "Most new tokens")->capture_default_str();
  add_option(app, "--temperature,--temp", params.temperature, "0: always the most likely token")->capture_default_str();
  add_option(app, "--top-p", params.top_p, "Keep the likeliest tokens that make up this probability")
      ->capture_default_str();
  add_option(app, "--top-k", params.top_k, "Keep this many of the likeliest tokens; 0: all")->capture_default_str();
  add_option(app, "--min-p", params.min_p, "Drop tokens less likely than this times the likeliest")
      ->capture_default_str();
  add_option(app, "--repetition-penalty", params.repetition_penalty, "Above 1: fewer repetitions")
      ->capture_default_str();
  add_option(app, "-s,--seed", params.seed, "Of the random numbers; without it, a new one each time");
  add_option(app, "--stop", params.stop, "Stop before this text; may be given several times")
      ->take_all()
      ->allow_extra_args(false);
  add_switch(app, "--ignore-eos", params.ignore_eos, "Go on after the end-of-sequence token");
}

void add_prompt_flags(CLI::App& app, PromptFlags& flags) {
  flags.text_option = app.add_option("-p,--prompt", flags.text, "The prompt");
  flags.file_option = app.add_option("-f,--file", flags.file, "Read the prompt from a file; without both, from stdin")
                          ->excludes(flags.text_option);
}

std::string read_file(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (!file) throw std::invalid_argument("cannot open " + path + ": " + std::generic_category().message(errno));
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> closer(file, std::fclose);
  return read_all(fileno(file), path);
}

std::string read_prompt(const PromptFlags& flags) {
  std::string text = flags.text;
  if (flags.text_option->count() == 0) {
    if (flags.file_option->count() == 0 && stdin_is_terminal()) {
      throw std::invalid_argument("no prompt: give -p TEXT or -f FILE, or pipe it in");
    }
    text = flags.file_option->count() > 0 ? read_file(flags.file) : read_all(STDIN_FILENO, "stdin");
    if (!text.empty() && text.back() == '\n') text.pop_back();
  }
  if (text.empty()) throw std::invalid_argument("prompt must not be empty");
  return text;
}

std::filesystem::path model_path(const ModelFlags& flags) {
  return flags.model.empty() ? demo_model() : std::filesystem::path(flags.model);
}

WeightType weight_type_of(const ModelFlags& flags, const Config& config) {
  return parse_weight_type(flags.dtype, config, flags.device);
}

int64_t context_of(const ModelFlags& flags, const Config& config) {
  return flags.ctx_size > 0 ? flags.ctx_size : config.max_position;
}

LoadedEngine load_engine(const ModelFlags& flags, std::optional<Tokenizer> tokenizer, Engine::Options options) {
  const double start = seconds_now();
  if (flags.threads > 0) set_threads(flags.threads);
  LoadOptions load_options;
  load_options.device = flags.device;
  load_options.dtype = flags.dtype;
  ProgressBar bar("loading", bytes_text);
  load_options.progress = [&bar](uint64_t done, uint64_t total) {
    throw_if_terminated();
    bar.update(static_cast<double>(done), static_cast<double>(total));
  };
  Mixtral model = from_pretrained(model_path(flags), load_options);
  options.chunk_size = flags.chunk_size;
  options.ctx_size = flags.ctx_size;
  options.cuda_graph = !flags.no_cuda_graph;
  return {Engine(model, std::move(tokenizer), options), seconds_now() - start};
}

void check_finished(const Generation& generation) {
  throw_if_terminated();
  if (generation.finish_reason == "error") throw std::runtime_error(generation.error);
}

double per_second(int64_t count, double seconds) { return seconds > 0 ? static_cast<double>(count) / seconds : 0.0; }

int64_t decoded_tokens(const Timings& timings, size_t sequences) {
  return std::max<int64_t>(0, timings.new_tokens - static_cast<int64_t>(sequences));
}

void print_stats(const Timings& timings, double load_seconds) {
  char line[200];
  std::snprintf(line, sizeof line, "load %.2f s | prompt %lld tokens, %.1f tokens/s | %lld new tokens, %.1f tokens/s\n",
                load_seconds, static_cast<long long>(timings.prompt_tokens),
                per_second(timings.prompt_tokens, timings.prefill_seconds), static_cast<long long>(timings.new_tokens),
                per_second(decoded_tokens(timings, 1), timings.decode_seconds));
  write_err(line);
}

std::string json_line(const nlohmann::json& value) {
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace mixtral::app
