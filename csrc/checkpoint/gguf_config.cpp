#include "gguf_config.h"

#include <string>

#include "../io/ggml_type.h"
#include "../io/gguf.h"
#include "../io/load_error.h"
#include "../model/config_fields.h"

namespace mixtral {
namespace {

const std::string kPrefix = "llama.";

std::string key_of(const IntegerField& field) { return kPrefix + field.gguf; }

// Features this model does not have: computing without them would give wrong numbers in silence.
void check_supported(const GgufFile& file) {
  const std::string& path = file.tensors.path();
  const std::string architecture = file.text("general.architecture");
  if (architecture != "llama") {
    throw LoadError(path, "general.architecture", "must be llama, as Mistral's and Mixtral's is, got " + architecture);
  }
  if (file.integer("split.count", 1) > 1) {
    throw LoadError(path, "split.count", "is one part of several: join them with `llama-gguf-split --merge`");
  }
  if (file.find(kPrefix + "rope.scaling.type") != nullptr && file.text(kPrefix + "rope.scaling.type") != "none") {
    throw LoadError(path, kPrefix + "rope.scaling.type",
                    "must be none, got " + file.text(kPrefix + "rope.scaling.type"));
  }
  if (file.find(kPrefix + "rope.scale_linear") != nullptr && file.number(kPrefix + "rope.scale_linear") != 1) {
    throw LoadError(path, kPrefix + "rope.scale_linear", "must be 1");
  }
  if (file.tensors.entries().count("rope_freqs.weight") != 0) {
    throw LoadError(path, "rope_freqs.weight", "is not supported: the rotary frequencies must not be scaled");
  }
  for (const auto& [name, entry] : file.tensors.entries()) {
    if (entry.dtype != "F32" && entry.dtype != "F16" && entry.dtype != "BF16" && !is_ggml_quantized(entry.dtype)) {
      throw LoadError(path, name, "must be F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K or Q6_K, got " + entry.dtype);
    }
  }
}

int64_t read_head_dim(const GgufFile& file, const Config& config) {
  const int64_t divided = config.num_heads > 0 ? config.hidden_size / config.num_heads : 0;
  const int64_t head_dim = file.integer(key_of(kHeadDim), divided);
  for (const char* key : {"attention.value_length", "rope.dimension_count"}) {
    if (file.integer(kPrefix + key, head_dim) != head_dim) {
      throw LoadError(file.tensors.path(), kPrefix + key, "must be " + std::to_string(head_dim) + ", as a head has");
    }
  }
  return head_dim;
}

// That of the matrices; quantised ones are computed with in bfloat16, as Mistral's own are.
std::string read_dtype(const GgufFile& file) {
  const auto found = file.tensors.entries().find("blk.0.attn_q.weight");
  if (found == file.tensors.entries().end()) return "bfloat16";
  return found->second.dtype == "F32" ? "float32" : found->second.dtype == "F16" ? "float16" : "bfloat16";
}

// Files of old converters have no llama.vocab_size.
int64_t read_vocab_size(const GgufFile& file) {
  const GgufValue* const tokens = file.find("tokenizer.ggml.tokens");
  const bool counted = tokens != nullptr && tokens->kind == GgufValue::kArray && tokens->count <= INT32_MAX;
  return counted && file.find(key_of(kVocabSize)) == nullptr ? static_cast<int64_t>(tokens->count)
                                                             : file.integer(key_of(kVocabSize));
}

}  // namespace

Config read_gguf_config(const std::filesystem::path& path) {
  const GgufFile file = open_gguf(path);
  check_supported(file);
  Config config;
  config.layout = CheckpointLayout::kGguf;
  for (const IntegerField& field : {kHiddenSize, kIntermediateSize, kNumLayers, kNumHeads, kMaxPosition}) {
    config.*field.member = file.integer(key_of(field));
  }
  config.num_kv_heads = file.integer(key_of(kNumKvHeads), config.num_heads);
  config.vocab_size = read_vocab_size(file);
  config.num_experts = file.integer(key_of(kNumExperts), 0);
  if (config.num_experts != 0) config.top_k = file.integer(key_of(kTopK));
  config.head_dim = read_head_dim(file, config);
  config.rms_norm_eps = file.number(kPrefix + "attention.layer_norm_rms_epsilon");
  const std::string base = kPrefix + "rope.freq_base";
  config.rope_theta = file.find(base) != nullptr ? file.number(base) : 1e4;  // llama.cpp's default
  config.window = file.integer(key_of(kWindow), 0);
  const char* const no = config.window == 0 ? "no " : "";
  config.window_source = path.filename().string() + ": " + no + key_of(kWindow);
  config.tie_word_embeddings = file.tensors.entries().count("output.weight") == 0;
  config.dtype = read_dtype(file);
  config.bos_token_id = file.integer("tokenizer.ggml.bos_token_id", config.bos_token_id);
  config.eos_token_ids = {file.integer("tokenizer.ggml.eos_token_id", 2)};
  if (const int64_t end_of_turn = file.integer("tokenizer.ggml.eot_token_id", -1); end_of_turn >= 0)
    config.eos_token_ids.push_back(end_of_turn);
  config.validate(path.string());
  return config;
}

}  // namespace mixtral
