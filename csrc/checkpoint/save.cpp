#include "save.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <system_error>

#include "../io/json.h"
#include "../model/transformer.h"
#include "weights.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr size_t kProgressBytes = 64 << 20;
constexpr uint64_t kMaxCarriedBytes = 16 << 20;  // a larger file is no description

// A file being written; any failure is an exception.
class Output {
 public:
  explicit Output(const fs::path& path) : path_(path), file_(std::fopen(path.c_str(), "wb"), std::fclose) {
    if (!file_) fail();
  }
  void write(const void* data, size_t bytes) {
    if (bytes > 0 && std::fwrite(data, 1, bytes, file_.get()) != bytes) fail();
  }
  void close() {
    if (std::fclose(file_.release()) != 0) fail();
  }

 private:
  [[noreturn]] void fail() const {
    throw std::runtime_error(path_.string() + ": cannot be written: " + std::generic_category().message(errno));
  }
  const fs::path path_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
};

std::string safetensors_header(const torch::OrderedDict<std::string, torch::Tensor>& parameters) {
  json header;
  size_t offset = 0;
  for (const auto& item : parameters) {
    const torch::Tensor& tensor = item.value();
    header[item.key()] = {{"dtype", safetensors_dtype(tensor.scalar_type())},
                          {"shape", tensor.sizes().vec()},
                          {"data_offsets", {offset, offset + tensor.nbytes()}}};
    offset += tensor.nbytes();
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');  // data begins aligned
  std::string prefix;
  for (int i = 0; i < 8; ++i) prefix += static_cast<char>(text.size() >> (8 * i) & 0xff);
  return prefix + text;
}

void write_weights(const MixtralImpl& model, const fs::path& path, const Progress& progress) {
  const auto parameters = model.named_parameters();
  uint64_t done = 0, total = 0;
  for (const auto& item : parameters) total += item.value().nbytes();
  Output file(path);
  const std::string header = safetensors_header(parameters);
  file.write(header.data(), header.size());
  for (const auto& item : parameters) {
    const char* data = static_cast<const char*>(item.value().data_ptr());
    const size_t bytes = item.value().nbytes();
    for (size_t begin = 0; begin < bytes; begin += kProgressBytes) {
      const size_t count = std::min(kProgressBytes, bytes - begin);
      file.write(data + begin, count);
      if (progress) progress(done += count, total);
    }
  }
  file.close();
}

void write_text(const fs::path& path, const std::string& text) {
  Output file(path);
  file.write(text.data(), text.size());
  file.close();
}

// Removed with all that is in it unless it was moved to its final name.
class NewFolder {
 public:
  explicit NewFolder(const fs::path& final_path) : final_path_(final_path), path_(final_path.string() + ".incomplete") {
    remove();
    if (!fs::create_directories(path_)) throw std::runtime_error(path_.string() + ": cannot be replaced");
  }
  ~NewFolder() { remove(); }
  const fs::path& path() const { return path_; }
  void finish() {
    std::error_code ignored;
    fs::remove(final_path_, ignored);  // an empty folder
    fs::rename(path_, final_path_);
  }

 private:
  // One level, file by file: libtorch exports a remove_all of its own that does not work.
  void remove() const {
    std::error_code ignored;
    if (!fs::is_directory(path_, ignored)) return;
    for (const auto& entry : fs::directory_iterator(path_, ignored)) fs::remove(entry.path(), ignored);
    fs::remove(path_, ignored);
  }
  const fs::path final_path_, path_;
};

// Absolute, without a slash at the end.
fs::path folder_path(const fs::path& folder) {
  const fs::path path = fs::absolute(folder).lexically_normal();
  return path.has_filename() ? path : path.parent_path();
}

// Not weights, nor what describes them; not what a version control system or a downloader has left.
bool is_carried(const fs::directory_entry& entry) {
  std::error_code ignored;
  if (!entry.is_regular_file(ignored)) return false;  // follows links: the files of a Hugging Face cache are some
  const std::string name = entry.path().filename().string(), extension = entry.path().extension().string();
  if (name.rfind("tokenizer", 0) == 0) return true;
  for (const char* weights : {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx"})
    if (extension == weights) return false;
  for (const char* written : {"config.json", "params.json", "quantize_config.json", "adapter_config.json"})
    if (name == written) return false;
  return name.front() != '.' && name.find(".index.json") == std::string::npos && extension != ".incomplete" &&
         entry.file_size(ignored) <= kMaxCarriedBytes;
}

void write_folder(const MixtralImpl& model, const fs::path& source, const fs::path& folder, const Progress& progress) {
  NewFolder incomplete(folder);
  Config config = model.config();
  config.quantization = model.weight_type().name();
  config.dtype = "bfloat16";
  write_text(incomplete.path() / "config.json", config_json(config));
  for (const auto& entry : fs::directory_iterator(source))
    if (is_carried(entry)) fs::copy_file(entry.path(), incomplete.path() / entry.path().filename());
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
  if (config.is_moe()) {
    result["num_local_experts"] = config.num_experts;
    result["num_experts_per_tok"] = config.top_k;
  }
  if (!config.quantization.empty())
    result["quantization_config"] = {{"format", "mixtral"}, {"dtype", config.quantization}};
  return result.dump(2) + "\n";
}

void check_unused(const fs::path& folder) {
  std::error_code ignored;
  if (!fs::exists(folder, ignored)) return;
  if (!fs::is_directory(folder, ignored) || !fs::is_empty(folder, ignored)) {
    throw std::invalid_argument(folder.string() + ": must not exist or be an empty folder");
  }
}

void save_quantized(const MixtralImpl& model, const fs::path& source, const fs::path& folder,
                    const Progress& progress) {
  const WeightType type = model.weight_type();
  if (!is_quantized(type.packing)) {
    throw std::invalid_argument("save_quantized: model must be int8, fp8 or int4, got " + type.name());
  }
  check_unused(folder);
  try {
    write_folder(model, source, folder_path(folder), progress);
  } catch (const fs::filesystem_error& error) {
    throw std::runtime_error(folder.string() + ": cannot be written: " + error.code().message());
  }
}

}  // namespace mixtral
