// `mixtral bench`: how fast a model runs here, and how far that is from what memory allows.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>

#include "../checkpoint/config_reader.h"
#include "../engine/append_document.h"
#include "../engine/replay.h"
#include "../engine/roofline.h"
#include "../engine/threads.h"
#include "../model/memory.h"
#include "../model/rolling_kv_cache.h"
#include "../model/transformer.h"
#include "commands.h"
#include "flags.h"
#include "load.h"
#include "ranks.h"
#include "report.h"
#include "signals.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

struct BenchFlags {
  ModelFlags model;
  RoutingFlags routing;
  int64_t prompt_tokens = 256, new_tokens = 64, batch = 1, repeat = 3;
  bool json = false;
};

struct Result {
  double load_seconds = 0, prefill_rate = 0, decode_rate = 0;  // tokens/s
  double weight_bytes = 0;                                     // read per decoded token
  double bandwidth = 0;                                        // measured, bytes/s
  int64_t peak_memory = 0;                                     // bytes, of the host and this process
  nlohmann::json parallel;                                     // of the ranks; null for one
  std::optional<int64_t> replayed_tokens;                      // of a round; with --replay
  bool speculates = false;
  int64_t drafted = 0, accepted = 0;  // tokens of a round
  nlohmann::json expert_counts;       // of the rounds; null where all experts are in memory

  // Of one process, whose every token reads its weights; else not a number.
  bool has_roofline() const { return parallel.is_null() && !speculates; }
  double percent_of_roofline() const {
    return has_roofline() ? 100 * decode_rate * weight_bytes / bandwidth : std::numeric_limits<double>::quiet_NaN();
  }
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

std::vector<std::vector<int64_t>> random_prompts(int64_t batch, int64_t length, int64_t vocab) {
  std::mt19937_64 random(0);
  std::vector<std::vector<int64_t>> prompts(static_cast<size_t>(batch));
  for (auto& prompt : prompts) {
    for (int64_t i = 0; i < length; ++i) {
      prompt.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(vocab)));
    }
  }
  return prompts;
}

int64_t peak_memory_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    int64_t kib = 0;
    if (word == "VmHWM:" && status >> kib) return kib * 1024;
  }
  return 0;
}

std::vector<Request> make_requests(const BenchFlags& flags, const Engine& engine) {
  SamplingParams params;
  params.max_tokens = flags.new_tokens;
  params.ignore_eos = true;
  std::vector<Request> requests;
  for (auto& prompt : random_prompts(flags.batch, flags.prompt_tokens, engine.config().vocab_size))
    requests.push_back({std::move(prompt), params, flags.model.experts_per_token, !flags.routing.trace.empty()});
  if (flags.routing.replay.empty()) return requests;
  const Replays replays = read_replays(flags.routing.replay, engine.model());
  for (Request& request : requests) {
    request.replay = replays.find(request.prompt_token_ids);
    if (!request.replay || request.replay->tokens() < flags.prompt_tokens)
      throw std::invalid_argument("--replay " + flags.routing.replay +
                                  ": is not of these prompts: trace a bench of the same --prompt-tokens, with as many "
                                  "prompts as --batch or more");
  }
  return requests;
}

// With fewer pages some prompts would wait for others, and the rates would not be those of --batch.
void check_pool(const BenchFlags& flags, const Engine& engine) {
  const int64_t tokens = flags.prompt_tokens + flags.new_tokens, pool = engine.stats().pages;
  const int64_t chunk = std::min(flags.model.chunk_size, tokens);
  const int64_t needed = flags.batch * RollingKVCache::pages_needed(engine.config(), kPageSize, chunk, tokens);
  if (needed <= pool) return;
  const auto page_bytes =
      static_cast<double>(RollingKVCache::page_bytes(engine.model().cache_config(), kPageSize, engine.model().dtype()));
  throw OutOfMemory("the key/value cache: --batch " + std::to_string(flags.batch) + " with " + std::to_string(tokens) +
                    " tokens each needs " + std::to_string(needed) + " pages (" +
                    bytes_text(static_cast<double>(needed) * page_bytes) + "), and the pool has " +
                    std::to_string(pool) + " (" + bytes_text(static_cast<double>(pool) * page_bytes) +
                    "): lower --batch or raise --kv-memory");
}

int64_t replayed_tokens_of(const std::vector<Request>& requests, const std::vector<Generation>& generations) {
  int64_t tokens = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    std::vector<int64_t> read = generations[i].prompt_token_ids;
    read.insert(read.end(), generations[i].token_ids.begin(), generations[i].token_ids.end() - 1);
    tokens += replayed_tokens(*requests[i].replay, read);
  }
  return tokens;
}

void save_traces(const RoutingFlags& flags, const std::vector<Generation>& generations, const Engine& engine) {
  Trace all = empty_trace(engine.config(), generations.front().trace->routing.top_k);
  for (const Generation& generation : generations) append_document(all, *generation.trace);
  save_trace(flags, all, engine, /*tokenizer=*/nullptr);
}

Result measure(const BenchFlags& flags) {
  check_trace_file(flags.routing);
  // All prompts advance together: no pass mixes prefill and decode.
  Engine::Options options;
  options.max_batch = flags.batch;
  options.token_budget = flags.batch * flags.model.chunk_size;
  options.prefix_cache = false;                                           // every round reads the same prompts
  LoadedEngine loaded = load_engine(flags.model, std::nullopt, options);  // random ids: no text
  Engine& engine = loaded.engine;
  check_pool(flags, engine);
  const std::vector<Request> requests = make_requests(flags, engine);
  Config config = engine.config();
  if (requests.front().replay) config.top_k = requests.front().replay->routing.top_k;
  const auto go_on = [](size_t, const std::string&) { return pending_signal() == 0; };

  engine.generate({requests.front()}, go_on);  // warms up
  const auto counts = [&] {
    const auto& runner = engine.model().expert_runner();
    return runner ? runner->counts() : ExpertCounts();
  };
  const ExpertCounts before = counts();
  std::vector<double> prefill, decode;
  std::vector<Generation> generations;  // of a round: all have the same
  Timings timings;
  for (int64_t i = 0; i < flags.repeat; ++i) {
    generations = engine.generate(requests, go_on, &timings);
    for (const Generation& generation : generations) check_finished(generation);
    prefill.push_back(per_second(timings.prompt_tokens, timings.prefill_seconds));
    decode.push_back(per_second(decoded_tokens(timings, requests.size()), timings.decode_seconds));
  }
  if (!flags.routing.trace.empty()) save_traces(flags.routing, generations, engine);
  Result result;
  result.parallel = parallel_json(flags.model, loaded.engine);
  if (requests.front().replay) result.replayed_tokens = replayed_tokens_of(requests, generations);
  result.speculates = flags.model.speculate > 0;
  result.drafted = timings.drafted_tokens;
  result.accepted = timings.accepted_tokens;
  if (engine.model().expert_runner()) {
    const ExpertCounts after = counts();
    result.expert_counts = {{"hits", after.hits - before.hits},
                            {"misses", after.misses - before.misses},
                            {"bytes", after.bytes - before.bytes}};
  }
  result.load_seconds = loaded.seconds;
  result.prefill_rate = median(prefill);
  result.decode_rate = median(decode);
  result.peak_memory = peak_memory_bytes();  // before the bandwidth buffer
  result.weight_bytes = weight_bytes_per_token(config, flags.batch, bytes_per_weight(engine.weight_type()));
  result.bandwidth =
      read_bandwidth(result.weight_bytes * static_cast<double>(flags.batch), engine.device(), throw_if_terminated);
  return result;
}

nlohmann::json to_json(const BenchFlags& flags, const Result& result, const Config& config) {
  nlohmann::json json = {{"model", model_path(flags.model).string()},
                         {"device", flags.model.device},
                         {"dtype", weight_type_of(flags.model, config).name()},
                         {"threads", num_threads()},
                         {"prompt_tokens", flags.prompt_tokens},
                         {"new_tokens", flags.new_tokens},
                         {"batch", flags.batch},
                         {"repeat", flags.repeat},
                         {"load_seconds", result.load_seconds},
                         {"prefill_tokens_per_second", result.prefill_rate},
                         {"decode_tokens_per_second", result.decode_rate},
                         {"weight_bytes_per_token", result.weight_bytes},
                         {"read_bandwidth_bytes_per_second", result.bandwidth},
                         {"percent_of_roofline", result.percent_of_roofline()},
                         {"peak_memory_bytes", result.peak_memory}};
  if (!result.parallel.is_null()) json["parallel"] = result.parallel;
  if (result.replayed_tokens) json["replayed_tokens"] = *result.replayed_tokens;
  if (result.speculates) {
    json["speculate"] = flags.model.speculate;
    json["drafted_tokens"] = result.drafted;
    json["accepted_tokens"] = result.accepted;
  }
  if (!result.expert_counts.is_null()) json["expert_counts"] = result.expert_counts;
  return json;
}

std::string replayed_text(const BenchFlags& flags, const Result& result) {
  if (!result.replayed_tokens) return "";
  char text[120];
  const int64_t read = flags.batch * (flags.prompt_tokens + flags.new_tokens - 1);
  std::snprintf(text, sizeof text, "replayed  %10lld tokens    (of the %lld that the model read)\n",
                static_cast<long long>(*result.replayed_tokens), static_cast<long long>(read));
  return text;
}

std::string drafted_text(const Result& result) {
  if (!result.speculates) return "";
  char text[120];
  std::snprintf(text, sizeof text, "drafted   %10lld tokens    (%lld were right)\n",
                static_cast<long long>(result.drafted), static_cast<long long>(result.accepted));
  return text;
}

std::string to_text(const BenchFlags& flags, const Result& result) {
  char text[600], percent[16] = "-  ";
  if (result.has_roofline()) std::snprintf(percent, sizeof percent, "%.1f %%", result.percent_of_roofline());
  std::snprintf(text, sizeof text,
                "load      %10.2f s\n"
                "prefill   %10.1f tokens/s  (%lld x %lld tokens)\n"
                "decode    %10.1f tokens/s  (%lld x %lld tokens)\n"
                "roofline  %12s         (%s of weights read per token, memory reads %s/s)\n"
                "peak      %10s          (host memory)\n",
                result.load_seconds, result.prefill_rate, static_cast<long long>(flags.batch),
                static_cast<long long>(flags.prompt_tokens), result.decode_rate, static_cast<long long>(flags.batch),
                static_cast<long long>(flags.new_tokens), percent, bytes_text(result.weight_bytes).c_str(),
                bytes_text(result.bandwidth).c_str(), bytes_text(static_cast<double>(result.peak_memory)).c_str());
  return std::string(text) + replayed_text(flags, result) + drafted_text(result);
}

void run(const BenchFlags& flags) {
  follow_as_rank(flags.model);
  const Config config = read_config(model_path(flags.model));
  const Result result = measure(flags);
  write_out(flags.json ? json_line(to_json(flags, result, config)) : to_text(flags, result));
}

}  // namespace

void add_bench(CLI::App& app) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App& command = *app.add_subcommand("bench", "Measure load time, tokens per second and memory");
  add_option(command, "--prompt-tokens", flags->prompt_tokens, "Length of each random prompt")
      ->check(at_least(1))
      ->capture_default_str();
  add_option(command, "--new-tokens", flags->new_tokens, "Tokens decoded per prompt, at least 2")
      ->check(in_range(2, 1 << 30))
      ->capture_default_str();
  add_option(command, "--batch", flags->batch, "Prompts at a time")->check(in_range(1, 65536))->capture_default_str();
  add_option(command, "--repeat", flags->repeat, "Runs; the median counts")
      ->check(in_range(1, 10000))
      ->capture_default_str();
  add_switch(command, "--json", flags->json, "One JSON object");
  add_routing_flags(command, flags->routing);
  add_model_flags(command, flags->model);
  add_loading_flags(command, flags->model);
  add_weights_flag(command, flags->model);
  add_mlock_flag(command, flags->model);
  add_offload_flags(command, flags->model);
  add_experts_flag(command, flags->model);
  add_rank_flags(command, flags->model);
  add_cuda_graph_flag(command, flags->model);
  add_speculate_flag(command, flags->model);
  add_kv_memory_flag(command, flags->model);
  command.footer(
      "Examples:\n"
      "  mixtral bench --prompt-tokens 512 --new-tokens 64\n"
      "  mixtral bench ./Mixtral-8x7B-v0.1 --batch 8 --device cuda --json");
  command.callback([flags] { run(*flags); });
}

}  // namespace mixtral::app
