// `mixtral info`: what a checkpoint is and what it needs, from its configuration alone.
#include <cstdio>
#include <memory>
#include <optional>
#include <stdexcept>

#include "../checkpoint/config_reader.h"
#include "../checkpoint/from_pretrained.h"
#include "../checkpoint/generation_config.h"
#include "../checkpoint/memory_plan.h"
#include "../io/load_error.h"
#include "../text/chat_format.h"
#include "commands.h"
#include "flags.h"
#include "load.h"
#include "mapped_report.h"
#include "offload_report.h"
#include "rank_plan.h"
#include "report.h"
#include "terminal.h"

namespace mixtral::app {
namespace {

struct InfoFlags {
  ModelFlags model;
  ParallelFlags parallel;
  bool plan = false;
  bool json = false;

  // Several ranks are of interest for their plan alone.
  bool wants_plan() const { return plan || parallel.tensor_size * parallel.stages > 1; }
};

int64_t bytes(double count) { return static_cast<int64_t>(count); }

double total(const MemoryPlan& memory) { return memory.weights + memory.cache; }

int64_t kv_bytes_per_token(const Config& config, const WeightType& type) {
  return config.kv_bytes_per_token(type.element_size());
}

int64_t bytes_of(const Config& config, const std::string& dtype, Packing packing = Packing::kNone) {
  return bytes(weight_bytes(config, {dtype, packing}));
}

std::string stored_dtype(const Config& config) {
  return config.quantization.empty() ? config.dtype : config.quantization;
}

const char* layout_name(const Config& config) {
  return config.layout == CheckpointLayout::kHuggingFace ? "huggingface"
         : config.layout == CheckpointLayout::kGguf      ? "gguf"
                                                         : "consolidated";
}

std::string architecture(const Config& config) {
  if (!config.is_moe()) return "dense (Mistral)";
  return "mixture of experts, top " + std::to_string(config.top_k) + " of " + std::to_string(config.num_experts);
}

// What `info` knows of a folder beside its configuration. A file that is wrong is told, and no error here.
struct Text {
  std::optional<Tokenizer> tokenizer;
  std::optional<ChatFormat> format;
  std::string why_no_format;
  GenerationConfig generation;
};

Text text_of(const std::filesystem::path& folder) {
  Text text;
  text.generation = read_generation_config(folder);
  try {
    text.tokenizer.emplace(folder);
    text.format.emplace(folder, *text.tokenizer);
  } catch (const LoadError& error) {
    text.why_no_format = error.reason();
  } catch (const std::invalid_argument&) {
    text.why_no_format = "no chat template: a base model";
  }
  return text;
}

// What of generation_config.json concerns sampling.
nlohmann::json sampling_json(const GenerationConfig& config) {
  nlohmann::json result = nlohmann::json::object();
  const auto put = [&result](const char* key, const auto& value) {
    if (value) result[key] = *value;
  };
  put("do_sample", config.do_sample);
  put("temperature", config.temperature);
  put("top_p", config.top_p);
  put("top_k", config.top_k);
  put("min_p", config.min_p);
  put("repetition_penalty", config.repetition_penalty);
  return result;
}

nlohmann::json to_json(const Config& config, const MemoryPlan& memory, const WeightType& type, const Text& text) {
  const int64_t parameters = config.total_parameters();
  nlohmann::json result = {{"architecture", architecture(config)},
                           {"layout", layout_name(config)},
                           {"num_layers", config.num_layers},
                           {"hidden_size", config.hidden_size},
                           {"intermediate_size", config.intermediate_size},
                           {"num_heads", config.num_heads},
                           {"num_kv_heads", config.num_kv_heads},
                           {"head_dim", config.head_dim},
                           {"num_experts", config.num_experts},
                           {"top_k", config.top_k},
                           {"vocab_size", config.vocab_size},
                           {"max_position", config.max_position},
                           {"rope_theta", config.rope_theta},
                           {"rms_norm_eps", config.rms_norm_eps},
                           {"window", config.window},
                           {"window_source", config.window_source},
                           {"checkpoint_dtype", stored_dtype(config)},
                           {"dtype", type.name()},
                           {"total_parameters", parameters},
                           {"active_parameters", config.active_parameters()},
                           {"eos_token_ids", config.eos_token_ids},
                           {"generation_config", sampling_json(text.generation)},
                           {"chat_format", nullptr}};
  if (text.format) result["chat_format"] = {{"name", text.format->name()}, {"source", text.format->source()}};
  result["memory"] = {{"weights_bytes_by_dtype",
                       {{"float32", bytes_of(config, "float32")},
                        {"bfloat16", bytes_of(config, "bfloat16")},
                        {"float16", bytes_of(config, "float16")},
                        {"int8", bytes_of(config, "bfloat16", Packing::kInt8)},
                        {"fp8", bytes_of(config, "bfloat16", Packing::kFp8)},
                        {"int4", bytes_of(config, "bfloat16", Packing::kInt4)}}},
                      {"weights_bytes", bytes(memory.weights)},
                      {"kv_bytes_per_token", kv_bytes_per_token(config, type)},
                      {"ctx_size", memory.ctx_size},
                      {"cached_tokens", memory.cached_tokens},
                      {"kv_bytes", bytes(memory.cache)},
                      {"activations_bytes", bytes(memory.activations)},
                      {"total_bytes", bytes(total(memory))}};
  return result;
}

std::string line(const char* name, const std::string& value) {
  char text[32];
  std::snprintf(text, sizeof text, "%-14s ", name);
  return text + value + "\n";
}

std::string billions(int64_t parameters) {
  char text[64];
  std::snprintf(text, sizeof text, "%lld (%.3g B)", static_cast<long long>(parameters),
                static_cast<double>(parameters) / 1e9);
  return text;
}

std::string size_of(int64_t bytes) { return bytes_text(static_cast<double>(bytes)); }

std::string stop_ids(const Config& config, const Text& text) {
  std::string ids;
  for (const int64_t id : config.eos_token_ids) {
    const std::string piece = text.tokenizer ? text.tokenizer->piece(id) : "";
    ids += (ids.empty() ? "" : ", ") + std::to_string(id) + (piece.empty() ? "" : " (" + piece + ")");
  }
  return ids.empty() ? "none" : ids;
}

std::string sampling(const GenerationConfig& config) {
  std::string values;
  const nlohmann::json fields = sampling_json(config);
  for (const auto& [key, value] : fields.items()) {
    values += (values.empty() ? "" : ", ") + key + " " + value.dump();
  }
  if (!values.empty()) values += " (generation_config.json; used with --generation-config)";
  for (const std::string& key : config.unsupported) values += (values.empty() ? "" : "; ") + key + " is not supported";
  return values;
}

std::string to_text(const Config& config, const MemoryPlan& memory, const WeightType& type, int64_t chunk_size,
                    const Text& of_text) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  const std::string window = config.window > 0 ? number(config.window) + " keys" : "none";
  const int64_t parameters = config.total_parameters();
  std::string text;
  text += line("architecture", architecture(config));
  text += line("layout", layout_name(config));
  text += line("layers", number(config.num_layers) + ", hidden " + number(config.hidden_size) + ", intermediate " +
                             number(config.intermediate_size));
  text += line("attention", number(config.num_heads) + " query heads, " + number(config.num_kv_heads) +
                                " key/value heads of " + number(config.head_dim));
  text += line("vocabulary", number(config.vocab_size));
  text += line("window", window + " (" + config.window_source + ")");
  text += line("max position", number(config.max_position));
  text += line("parameters", billions(parameters));
  text += line("active", billions(config.active_parameters()) + " per token");
  text += line("stop ids", stop_ids(config, of_text));
  text += line("chat format",
               of_text.format ? of_text.format->name() + " (" + of_text.format->source() + ")" : of_text.why_no_format);
  if (const std::string values = sampling(of_text.generation); !values.empty()) text += line("sampling", values);
  text += line("dtype", type.name() + " (checkpoint: " + stored_dtype(config) + ")");
  text += line("weights", bytes_text(memory.weights) + "; float32 " + size_of(bytes_of(config, "float32")) +
                              ", bfloat16 and float16 " + size_of(bytes_of(config, "bfloat16")) + ", int8 and fp8 " +
                              size_of(bytes_of(config, "bfloat16", Packing::kInt8)) + ", int4 " +
                              size_of(bytes_of(config, "bfloat16", Packing::kInt4)));
  text += line("cache", size_of(kv_bytes_per_token(config, type)) + " per token; " + bytes_text(memory.cache) +
                            " for a context of " + number(memory.ctx_size) + " (at most " +
                            number(memory.cached_tokens) + " tokens kept)");
  text += line("total", bytes_text(total(memory)) + ", and " + bytes_text(memory.activations) +
                            " of activations in a pass of " + number(chunk_size) + " tokens");
  return text;
}

// As loading does.
void check_offload(const InfoFlags& flags) {
  LoadOptions options;
  options.device = flags.model.device;
  options.weights = parse_weights(flags.model.weights);
  options.gpu_memory = flags.model.gpu_memory;
  options.simulate_gpu = flags.model.simulate_gpu;
  const ParallelFlags& parallel = flags.parallel;
  options.placement = Placement::of_rank(0, parallel.tensor_size, parallel.stages, parallel.expert_parallel);
  check_options(options);
}

void run(InfoFlags flags) {
  use_threads(flags.model);
  const bool offloads = flags.model.gpu_memory > 0;
  if (offloads && !flags.model.simulate_gpu) flags.model.device = "cuda";  // which this machine need not have
  if (offloads || flags.model.simulate_gpu) check_offload(flags);
  const Config config = read_config(model_path(flags.model), warn);
  const WeightType type = weight_type_of(flags.model, config);
  const MemoryPlan memory = plan_memory(config, type, flags.model.device, flags.model.ctx_size, flags.model.chunk_size);
  const Text text = text_of(model_path(flags.model));
  nlohmann::json plan;
  if (flags.wants_plan()) plan = rank_plan(flags.model, flags.parallel, config);
  std::optional<MappedReport> mapped;
  if (parse_weights(flags.model.weights) == Weights::kMmap)
    mapped = report_mapped(model_path(flags.model), config, type, memory);
  std::optional<OffloadReport> offload;
  if (offloads) offload = report_offload(flags.model, config, type, memory);
  if (flags.json) {
    nlohmann::json result = to_json(config, memory, type, text);
    if (offload) result["offload"] = offload_json(*offload);
    if (mapped) result["mapped"] = mapped_json(*mapped);
    if (flags.wants_plan()) result["plan"] = plan;
    return write_out(json_line(result));
  }
  std::string lines = to_text(config, memory, type, flags.model.chunk_size, text);
  if (mapped)
    for (const auto& [name, value] : mapped_rows(*mapped)) lines += line(name.c_str(), value);
  if (offload)
    for (const auto& [name, value] : offload_rows(*offload)) lines += line(name.c_str(), value);
  write_out(lines + (plan.is_null() ? "" : plan_text(plan)));
}

}  // namespace

void add_info(CLI::App& app) {
  auto flags = std::make_shared<InfoFlags>();
  CLI::App& command = *app.add_subcommand("info", "Show architecture, parameters and memory need; needs no weights");
  add_switch(command, "--json", flags->json, "One JSON object");
  add_model_flags(command, flags->model);
  add_switch(command, "--plan", flags->plan, "What each process would hold");
  add_parallel_flags(command, flags->parallel);
  add_weights_flag(command, flags->model);
  add_offload_flags(command, flags->model);
  command.footer(
      "Examples:\n"
      "  mixtral info\n"
      "  mixtral info ./Mixtral-8x7B-v0.1 --dtype bfloat16 -c 32768 --json\n"
      "  mixtral info ./Mixtral-8x7B-v0.1-int4 --weights mmap -c 4096\n"
      "  mixtral info ./Mixtral-8x7B-v0.1 --gpu-memory 20GiB --dtype int8\n"
      "  mixtral info ./Mixtral-8x7B-v0.1 --plan --tensor-parallel-size 2");
  command.callback([flags] { run(*flags); });
}

}  // namespace mixtral::app
