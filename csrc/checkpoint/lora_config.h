// What the files beside an adapter's weights say: how much of the weights to add, and how they are laid out.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace mixtral {

struct LoraConfig {
  std::filesystem::path weights;  // the file
  // PEFT: alpha / rank, or alpha / sqrt(rank). The patterns are for single modules, the first that fits counts.
  double rank = 0, alpha = 0;
  bool use_rslora = false;
  std::vector<std::pair<std::string, double>> rank_pattern, alpha_pattern;
  // PEFT before 0.19.1 took the two last dimensions of an expert parameter the other way round.
  bool swapped_experts = false;
  double scaling = 0;  // mistral-finetune: the factor itself; rank and alpha are 0

  // The factor of B A in module "model.layers.0.self_attn.q_proj". Throws LoadError when `rank`, that of the weights,
  // is not the one of the configuration.
  double scale(const std::string& module, int64_t rank) const;
};

// `path`: the folder, or the weights in it, of PEFT (adapter_config.json, adapter_model.safetensors) or of
// mistral-finetune (lora.safetensors, and the scaling in params.json, else 2). Throws LoadError, also for variants of
// LoRA that are more than W + s B A.
LoraConfig read_lora_config(const std::filesystem::path& path);

// For messages, where an adapter is given as a model: ": give the model that it was made for (org/name), and this
// folder to --lora", the name if adapter_config.json has one.
std::string adapter_advice(const std::filesystem::path& folder);

// Whether PEFT's pattern, a regular expression, fits the module's name from its beginning or from a dot on. Throws
// std::invalid_argument for an expression with more than letters, ".", ".*", "\.", "^" and "$".
bool fits_pattern(const std::string& pattern, const std::string& module);

}  // namespace mixtral
