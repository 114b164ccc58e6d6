// The architecture of a checkpoint: Mixtral 8x7B/8x22B, Mistral 7B (dense), Switch-style (top-1, no renormalisation),
// and anything between.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mixtral {

enum class CheckpointLayout {
  kHuggingFace,   // config.json, model*.safetensors, half-split rotary rows
  kConsolidated,  // params.json, consolidated.safetensors, interleaved rotary rows
  kGguf,          // one .gguf file, interleaved rotary rows
};

struct Config {
  CheckpointLayout layout = CheckpointLayout::kHuggingFace;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_position = 0;
  int64_t num_experts = 0;  // 0: a dense feed-forward block, as in Mistral 7B
  int64_t top_k = 0;        // experts per token
  bool renormalize = true;  // false: Switch router, the weight is the plain softmax probability
  // false ("router_dtype": "model"): logits rounded to the model's dtype, as in Hugging Face
  bool router_in_f32 = true;
  // "use_expert_bias": a router's choice, not its weights, sees a bias of each expert (Wang et al.,
  // "Auxiliary-Loss-Free Load Balancing", 2024)
  bool select_bias = false;
  double rms_norm_eps = 0;
  double rope_theta = 0;
  int64_t window = 0;         // keys a query sees, itself included; 0: no window
  std::string window_source;  // where the window came from, in words: "config.json: sliding_window"
  bool tie_word_embeddings = false;
  std::string dtype = "bfloat16";  // of the checkpoint: "float32", "bfloat16" or "float16"
  std::string quantization;        // of its packed matrices (save.h): as in WeightType::name; empty: not packed
  int64_t bos_token_id = 1;
  std::vector<int64_t> eos_token_ids = {2};

  bool is_moe() const { return num_experts > 0; }

  // Throws std::invalid_argument unless k experts can compute for a token: k in [1, E]; none without experts.
  void check_experts_per_token(int64_t k) const;

  // Throws LoadError (file `source`) when a field is missing, out of range or does not fit another one.
  void validate(const std::string& source) const;

  int64_t total_parameters() const;
  int64_t active_parameters() const;  // per token: all but the unused experts of every layer
  int64_t kv_bytes_per_token(int64_t element_size) const;
};

}  // namespace mixtral
