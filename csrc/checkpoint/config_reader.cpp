#include "config_reader.h"

#include <charconv>

#include "../io/file.h"
#include "../io/file_kind.h"
#include "../io/gguf.h"
#include "../io/json_fields.h"
#include "../io/load_error.h"
#include "../model/config_fields.h"
#include "../text/tokenizer.h"
#include "contents.h"
#include "files.h"
#include "folder.h"
#include "generation_config.h"
#include "gguf_config.h"

// A missing key is an error wherever a silent default could differ from the model: the class defaults of transformers
// are not the values of the published Mistral and Mixtral models (rms_norm_eps, sliding_window, rope_theta).

namespace mixtral {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxConfigBytes = 1 << 20;

// An integer, decimal digits, or one window per layer, which must all agree.
int64_t parse_window(const JsonFields& fields, const char* key, const json& value) {
  if (value.is_array() && !value.empty()) {
    for (const json& layer : value) {
      if (layer != value.front()) fields.fail(key, "must be the same in every layer, got " + shown(value));
    }
    return value.front().is_null() ? 0 : parse_window(fields, key, value.front());
  }
  int64_t window = 0;
  if (value.is_string()) {
    const std::string& text = value.get_ref<const std::string&>();
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), window);
    if (error != std::errc() || end != text.data() + text.size()) {
      fields.fail(key, "must be an integer, got " + shown(value));
    }
  } else {
    window = fields.as_integer(key, value);
  }
  if (window < kWindow.min || window > kWindow.max) {
    fields.fail(key, "must be null or in [1, 2147483647], got " + shown(value));
  }
  return window;
}

void read_window(const JsonFields& fields, const char* key, const std::string& source, Config& config) {
  const json* value = fields.find(key);
  config.window = value ? parse_window(fields, key, *value) : 0;
  const std::string file = std::filesystem::path(source).filename().string();
  config.window_source =
      file + (fields.contains(key) ? ": " : ": no ") + key + (value || !fields.contains(key) ? "" : " null");
}

// transformers v5 writes rope_parameters, v4 wrote rope_theta and rope_scaling.
double read_rope_theta(const JsonFields& fields) {
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    if (!fields.find(key)) continue;
    const JsonFields rope = fields.object(key);
    for (const char* type : {"rope_type", "type"}) {
      if (rope.find(type) && rope.string(type) != "default") {
        fields.fail(key, "must have rope_type \"default\", got " + shown(rope.at(type)));
      }
    }
    if (rope.find("partial_rotary_factor") && rope.number("partial_rotary_factor") != 1) {
      fields.fail(key, "must have partial_rotary_factor 1, got " + shown(rope.at("partial_rotary_factor")));
    }
  }
  const bool nested = fields.find("rope_parameters") && fields.object("rope_parameters").find("rope_theta");
  if (!nested) return fields.number("rope_theta");
  const double theta = fields.object("rope_parameters").number("rope_theta");
  if (fields.find("rope_theta") && fields.number("rope_theta") != theta) {
    fields.fail("rope_theta", "must agree with rope_parameters");
  }
  return theta;
}

std::string read_dtype(const JsonFields& fields, const std::string& absent) {
  const char* key = fields.find("dtype") ? "dtype" : "torch_dtype";
  if (!fields.find(key)) return absent;
  const std::string dtype = fields.string(key);
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "float16") {
    fields.fail(key, "must be float32, bfloat16 or float16, got " + shown(dtype));
  }
  return dtype;
}

// Only the format of save.h, and wrote before as a "quant_method".
std::string read_quantization(const JsonFields& fields) {
  const char* key = "quantization_config";
  if (!fields.find(key)) return "";
  const JsonFields quantization = fields.object(key);
  const char* name = quantization.find("format") ? "format" : "quant_method";
  if (!quantization.find(name) || quantization.at(name) != "mixtral") {
    const char* method = quantization.find("quant_method") ? "quant_method" : name;
    fields.fail(key, (quantization.find(method) ? shown(quantization.at(method)) : "a quantisation without a name") +
                         " is not supported: take the checkpoint that is not quantised; `mixtral quantize` makes it "
                         "small");
  }
  const std::string dtype = quantization.string("dtype");
  for (const char* known : {"int8", "fp8", "int4", "float32", "bfloat16", "float16"})
    if (dtype == known) return dtype;
  fields.fail(key, "must have dtype \"int8\", \"fp8\", \"int4\" or that of a float, got " + shown(fields.at(key)));
}

// The keys that both kinds of file share: the router's variants and the special tokens.
void read_common(const JsonFields& fields, Config& config) {
  config.renormalize = fields.boolean("norm_topk_prob", true);
  config.select_bias = fields.boolean("use_expert_bias", false);
  if (fields.find("router_dtype")) {
    const std::string dtype = fields.string("router_dtype");
    if (dtype != "float32" && dtype != "model") {
      fields.fail("router_dtype", "must be \"float32\" or \"model\", got " + shown(dtype));
    }
    config.router_in_f32 = dtype == "float32";
  }
  config.bos_token_id = fields.integer("bos_token_id", 1);
  if (const json* eos = fields.find("eos_token_id")) {
    config.eos_token_ids.clear();
    for (const json& id : eos->is_array() ? *eos : json::array({*eos})) {
      config.eos_token_ids.push_back(fields.as_integer("eos_token_id", id));
    }
  }
}

Config read_hugging_face(const JsonFields& fields, const std::string& source) {
  fields.reject({"attention_bias", "mlp_bias", "layer_types"});
  const std::string type = fields.string("model_type");
  if (type != "mixtral" && type != "mistral") {
    fields.fail("model_type", "must be \"mixtral\" or \"mistral\", got " + shown(type));
  }
  if (fields.find("hidden_act") && fields.string("hidden_act") != "silu") {
    fields.fail("hidden_act", "must be \"silu\", got " + shown(fields.at("hidden_act")));
  }
  Config config;
  for (const IntegerField& field :
       {kHiddenSize, kIntermediateSize, kNumLayers, kNumHeads, kNumKvHeads, kVocabSize, kMaxPosition}) {
    config.*field.member = fields.integer(field.hugging_face);
  }
  if (type == "mixtral") {
    config.num_experts = fields.integer(kNumExperts.hugging_face);
    config.top_k = fields.integer(kTopK.hugging_face);
  } else if (!fields.contains("sliding_window")) {
    fields.fail("sliding_window", "is missing (null: no window)");
  }
  config.rms_norm_eps = fields.number("rms_norm_eps");
  config.rope_theta = read_rope_theta(fields);
  config.tie_word_embeddings = fields.boolean("tie_word_embeddings", false);
  config.dtype = read_dtype(fields, "float32");  // as transformers: every other type converts to it without loss
  config.quantization = read_quantization(fields);
  read_window(fields, "sliding_window", source, config);
  return config;
}

Config read_consolidated(const JsonFields& fields, const std::string& source) {
  // "lora", where mistral-finetune has left it, says how the weights were trained.
  fields.reject({"quantization", "vision_encoder", "yarn", "rope_scaling"});
  if (fields.find("model_type") && fields.string("model_type") != "transformer") {
    fields.fail("model_type", "must be \"transformer\", got " + shown(fields.at("model_type")));
  }
  Config config;
  config.layout = CheckpointLayout::kConsolidated;
  const auto either = [&](const JsonFields& in, const char* key, const char* alias) {
    return in.find(key) ? key : alias;
  };
  // The first release (December 2023) has the names of config.json.
  for (const IntegerField& field : {kHiddenSize, kIntermediateSize, kNumLayers, kNumHeads, kNumKvHeads, kVocabSize}) {
    config.*field.member = fields.integer(fields.find(field.hugging_face) ? field.hugging_face : field.consolidated);
  }
  config.max_position = fields.integer(either(fields, "max_seq_len", "max_position_embeddings"), 32768);
  const bool nested = fields.find("moe");
  const JsonFields moe = nested ? fields.object("moe") : fields;
  const char* num_experts = either(moe, "num_experts", "num_local_experts");
  if (nested || fields.find(num_experts)) {
    config.num_experts = moe.integer(num_experts);
    config.top_k = moe.integer("num_experts_per_tok");
  }
  config.rms_norm_eps = fields.number(either(fields, "rms_norm_eps", "norm_eps"));
  read_window(fields, either(fields, "_sliding_window", "sliding_window"), source, config);
  // Files of models with a window were written before rope_theta was a field.
  config.rope_theta = fields.find("rope_theta") ? fields.number("rope_theta") : config.window > 0 ? 1e4 : 1e6;
  config.tie_word_embeddings = fields.boolean(either(fields, "tied_embeddings", "tie_word_embeddings"), false);
  config.dtype = read_dtype(fields, "bfloat16");
  return config;
}

// An end of sequence outside the vocabulary is no token that the model can write.
void drop_unknown_eos(Config& config, const std::string& source, const Warn& warn) {
  std::vector<int64_t> known;
  for (const int64_t id : config.eos_token_ids) {
    if (0 <= id && id < config.vocab_size) {
      known.push_back(id);
    } else if (warn) {
      warn(source + ": eos_token_id: " + std::to_string(id) + " is not in the vocabulary of " +
           std::to_string(config.vocab_size) + " and is left out");
    }
  }
  config.eos_token_ids = known;
}

// params.json mostly leaves the end of a sequence to the tokenizer.
void read_tokenizer_eos(const std::filesystem::path& folder, Config& config) {
  if (!Tokenizer::in_folder(folder)) return;
  try {
    config.eos_token_ids = {Tokenizer(folder).eos_id()};
  } catch (const LoadError&) {  // whoever needs the tokenizer says what is wrong with it
  }
}

Config read_fields(const JsonFields& fields, CheckpointLayout layout, const std::string& source) {
  Config config =
      layout == CheckpointLayout::kHuggingFace ? read_hugging_face(fields, source) : read_consolidated(fields, source);
  read_common(fields, config);
  config.head_dim = fields.integer("head_dim", config.num_heads > 0 ? config.hidden_size / config.num_heads : 0);
  return config;
}

// Files that cannot be read are no matter here: the loader says what is wrong with them.
std::vector<TensorFile> files_if_any(const std::filesystem::path& folder, CheckpointLayout layout) {
  try {
    return open_files(folder, layout);
  } catch (const LoadError&) {
    return {};
  }
}

}  // namespace

Config parse_config(const std::string& text, CheckpointLayout layout, const std::string& source, const Warn& warn) {
  const json object = parse_json(text, source);
  Config config = read_fields(JsonFields(object, source), layout, source);
  drop_unknown_eos(config, source, warn);
  config.validate(source);
  return config;
}

Config read_config(const std::filesystem::path& folder, const Warn& warn) {
  const CheckpointLayout layout = layout_of(folder, warn);
  if (layout == CheckpointLayout::kGguf) return read_gguf_config(find_gguf(folder));
  const std::string source =
      (folder / (layout == CheckpointLayout::kHuggingFace ? "config.json" : "params.json")).string();
  check_kind(File(source));
  const json object = parse_json(read_text(source, kMaxConfigBytes), source);
  const JsonFields fields(object, source);
  Config config = read_fields(fields, layout, source);
  // Who downloads consolidated.safetensors may take config.json with it, and leave params.json.
  const bool other = !has_weights(folder, layout) && has_weights(folder, CheckpointLayout::kConsolidated);
  if (other) config.layout = CheckpointLayout::kConsolidated;
  if (config.quantization.empty()) {
    const bool dtype_is_said = fields.find("dtype") || fields.find("torch_dtype");
    correct_by_contents(config, dtype_is_said, files_if_any(folder, config.layout), source, warn);
  }
  if (layout == CheckpointLayout::kConsolidated && !fields.find("eos_token_id")) read_tokenizer_eos(folder, config);
  drop_unknown_eos(config, source, warn);
  add_stop_ids(read_generation_config(folder), config, warn);
  config.validate(source);
  return config;
}

}  // namespace mixtral
