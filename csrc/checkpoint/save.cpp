#include "save.h"

#include <algorithm>
#include <stdexcept>

#include "../io/json.h"
#include "../io/safetensors_writer.h"
#include "../model/transformer.h"
#include "output_folder.h"
#include "weights.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr size_t kWriteBytes = 64 << 20;  // at a time

std::string header_of(const torch::OrderedDict<std::string, torch::Tensor>& parameters) {
  std::vector<StoredTensor> tensors;
  for (const auto& item : parameters) {
    const torch::Tensor& tensor = item.value();
    tensors.push_back({item.key(), safetensors_dtype(tensor.scalar_type()), tensor.sizes().vec(), tensor.nbytes()});
  }
  return safetensors_header(tensors);
}

void write_weights(const MixtralImpl& model, const fs::path& path, const Progress& progress) {
  const auto parameters = model.named_parameters();
  uint64_t done = 0, total = 0;
  for (const auto& item : parameters) total += item.value().nbytes();
  OutputFile file(path);
  const std::string header = header_of(parameters);
  file.write(header.data(), header.size());
  for (const auto& item : parameters) {
    const char* data = static_cast<const char*>(item.value().data_ptr());
    const size_t bytes = item.value().nbytes();
    for (size_t begin = 0; begin < bytes; begin += kWriteBytes) {
      const size_t count = std::min(kWriteBytes, bytes - begin);
      file.write(data + begin, count);
      if (progress) progress(done += count, total);
    }
  }
  file.close();
}

void write_folder(const MixtralImpl& model, const fs::path& source, const fs::path& folder, const Progress& progress) {
  NewFolder incomplete(folder);
  Config config = model.config();
  config.quantization = model.weight_type().name();
  config.dtype = "bfloat16";
  write_text(incomplete.path() / "config.json", config_json(config));
  carry_files(source, incomplete.path());
  write_weights(model, incomplete.path() / "model.safetensors", progress);
  incomplete.finish();
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

void save_quantized(const MixtralImpl& model, const fs::path& source, const fs::path& folder,
                    const Progress& progress) {
  const WeightType type = model.weight_type();
  if (!is_quantized(type.packing)) {
    throw std::invalid_argument("save_quantized: model must be int8, fp8 or int4, got " + type.name());
  }
  check_unused(folder);
  try {
    write_folder(model, source, folder, progress);
  } catch (const fs::filesystem_error& error) {
    throw std::runtime_error(folder.string() + ": cannot be written: " + error.code().message());
  }
}

}  // namespace mixtral
