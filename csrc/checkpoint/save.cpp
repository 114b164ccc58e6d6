#include "save.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <vector>

#include "../io/json.h"
#include "../io/safetensors_writer.h"
#include "../model/parameters.h"
#include "../model/transformer.h"
#include "config_reader.h"
#include "output_folder.h"
#include "weights.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr size_t kWriteBytes = 64 << 20;  // at a time

using GetParameter = std::function<torch::Tensor(const Parameter&)>;

// The parameters of a model as they lie in the file. Pages of experts are not shared with other tensors then.
struct FileLayout {
  std::vector<Parameter> parameters;
  std::vector<StoredTensor> tensors;
  uint64_t bytes = 0;
};

FileLayout file_layout(const Config& config, const WeightType& type) {
  FileLayout layout;
  const auto meta = [&](const Parameter& parameter) {
    return empty_parameter(parameter, scalar_type(type.dtype), torch::kMeta, type.packing);
  };
  layout.parameters = model_parameters(config);
  std::stable_partition(layout.parameters.begin(), layout.parameters.end(),
                        [&](const Parameter& parameter) { return meta(parameter).nbytes() % kPageBytes == 0; });
  for (const Parameter& parameter : layout.parameters) {
    const torch::Tensor tensor = meta(parameter);
    layout.tensors.push_back(
        {parameter.name, safetensors_dtype(tensor.scalar_type()), tensor.sizes().vec(), tensor.nbytes()});
    layout.bytes += tensor.nbytes();
  }
  return layout;
}

void write_weights(const FileLayout& layout, const GetParameter& get, const fs::path& path, const Progress& progress) {
  uint64_t done = 0;
  OutputFile file(path);
  const std::string header = safetensors_header(layout.tensors, {}, kPageBytes);
  file.write(header.data(), header.size());
  for (const Parameter& parameter : layout.parameters) {
    const torch::Tensor tensor = get(parameter);
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    for (size_t begin = 0; begin < tensor.nbytes(); begin += kWriteBytes) {
      const size_t count = std::min(kWriteBytes, tensor.nbytes() - begin);
      file.write(data + begin, count);
      if (progress) progress(done += count, layout.bytes);
    }
  }
  file.close();
}

void write_folder(Config config, const WeightType& type, const GetParameter& get, const fs::path& source,
                  const fs::path& folder, const Progress& progress) {
  const FileLayout layout = file_layout(config, type);
  config.quantization = type.name();
  config.dtype = type.dtype;
  try {
    NewFolder incomplete(folder);
    write_text(incomplete.path() / "config.json", config_json(config));
    carry_files(source, incomplete.path());
    write_weights(layout, get, incomplete.path() / "model.safetensors", progress);
    incomplete.finish();
  } catch (const fs::filesystem_error& error) {
    throw std::runtime_error(folder.string() + ": cannot be written: " + error.code().message());
  }
}

}  // namespace

std::string config_json(const Config& config) {
  json result = {{"architectures", {config.is_moe() ? "MixtralForCausalLM" : "MistralForCausalLM"}},
                 {"model_type", config.is_moe() ? "mixtral" : "mistral"},
                 {"hidden_act", "silu"},
                 {"hidden_size", config.hidden_size},
                 {"intermediate_size", config.intermediate_size},
                 {"num_hidden_layers", config.num_layers},
                 {"num_attention_heads", config.num_heads},
                 {"num_key_value_heads", config.num_kv_heads},
                 {"head_dim", config.head_dim},
                 {"vocab_size", config.vocab_size},
                 {"max_position_embeddings", config.max_position},
                 {"rms_norm_eps", config.rms_norm_eps},
                 {"rope_theta", config.rope_theta},
                 {"sliding_window", config.window > 0 ? json(config.window) : json(nullptr)},
                 {"tie_word_embeddings", config.tie_word_embeddings},
                 {"norm_topk_prob", config.renormalize},
                 {"router_dtype", config.router_in_f32 ? "float32" : "model"},
                 {"torch_dtype", config.dtype},
                 {"bos_token_id", config.bos_token_id},
                 {"eos_token_id", config.eos_token_ids}};
  if (config.select_bias) result["use_expert_bias"] = true;
  if (config.is_moe()) {
    result["num_local_experts"] = config.num_experts;
    result["num_experts_per_tok"] = config.top_k;
  }
  if (!config.quantization.empty())
    result["quantization_config"] = {{"format", "mixtral"}, {"dtype", config.quantization}};
  return result.dump(2) + "\n";
}

std::string params_json(const Config& config) {
  json result = {{"dim", config.hidden_size},
                 {"hidden_dim", config.intermediate_size},
                 {"n_layers", config.num_layers},
                 {"n_heads", config.num_heads},
                 {"n_kv_heads", config.num_kv_heads},
                 {"head_dim", config.head_dim},
                 {"vocab_size", config.vocab_size},
                 {"max_seq_len", config.max_position},
                 {"norm_eps", config.rms_norm_eps},
                 {"rope_theta", config.rope_theta},
                 {"sliding_window", config.window > 0 ? json(config.window) : json(nullptr)},
                 {"tied_embeddings", config.tie_word_embeddings},
                 {"norm_topk_prob", config.renormalize},
                 {"router_dtype", config.router_in_f32 ? "float32" : "model"},
                 {"dtype", config.dtype},
                 {"bos_token_id", config.bos_token_id},
                 {"eos_token_id", config.eos_token_ids}};
  if (config.select_bias) result["use_expert_bias"] = true;
  if (config.is_moe()) result["moe"] = {{"num_experts", config.num_experts}, {"num_experts_per_tok", config.top_k}};
  return result.dump(2) + "\n";
}

void write_packed(const fs::path& source, const fs::path& folder, const LoadOptions& options) {
  check_unused(folder);
  const Config config = read_config(source, options.warn);
  const WeightType type = parse_weight_type(options.dtype, config);
  if (type.packing == Packing::kNone) {
    throw std::invalid_argument("dtype " + type.name() + " can be packed for sizes that are multiples of 32, got " +
                                unfit_size(config));
  }
  const Checkpoint checkpoint(source, config, options);
  const auto read = [&](const Parameter& parameter) {
    torch::OrderedDict<std::string, torch::Tensor> one;
    one.insert(parameter.name, empty_parameter(parameter, scalar_type(type.dtype), torch::kCPU, type.packing));
    checkpoint.read_into(one, type.packing, nullptr);
    return one[parameter.name];
  };
  write_folder(config, type, read, source, folder, options.progress);
}

void save_packed(const MixtralImpl& model, const fs::path& source, const fs::path& folder, const Progress& progress) {
  const WeightType type = model.weight_type();
  if (type.packing == Packing::kNone)
    throw std::invalid_argument("save_packed: model must be packed, got plain weights");
  check_unused(folder);
  const auto parameters = model.named_parameters();
  const auto get = [&](const Parameter& parameter) { return parameters[parameter.name]; };
  write_folder(model.config(), type, get, source, folder, progress);
}

}  // namespace mixtral
