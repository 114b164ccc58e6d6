#include "prompt_cache_file.h"

#include <algorithm>
#include <utility>

#include "../checkpoint/output_folder.h"
#include "../checkpoint/weights.h"
#include "../io/load_error.h"
#include "../io/safetensors.h"
#include "../io/safetensors_writer.h"
#include "fingerprint.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

torch::Tensor fingerprint_of(const MixtralImpl& model) {
  const auto hash = static_cast<int64_t>(fingerprint(model, model.config()));
  return torch::tensor(std::vector<int64_t>{hash}, torch::kInt64).view(torch::kUInt8);
}

using NamedTensors = std::vector<std::pair<std::string, torch::Tensor>>;

const char* dtype_name(const torch::Tensor& tensor) {
  return tensor.scalar_type() == torch::kInt64 ? "I64" : safetensors_dtype(tensor.scalar_type());
}

void write_tensors(const NamedTensors& tensors, OutputFile& file) {
  std::vector<StoredTensor> stored;
  for (const auto& [name, tensor] : tensors) {
    stored.push_back({name, dtype_name(tensor), tensor.sizes().vec(), tensor.nbytes()});
  }
  const std::string header = safetensors_header(stored);
  file.write(header.data(), header.size());
  for (const auto& [name, tensor] : tensors) file.write(tensor.data_ptr(), tensor.nbytes());
}

// The tensor `name` of `file`; it must have the type and shape of `like`, where -1 is any size.
torch::Tensor read_tensor(const TensorFile& file, const std::string& name, const torch::Tensor& like,
                          std::vector<int64_t> shape) {
  const auto found = file.entries().find(name);
  if (found == file.entries().end()) throw LoadError(file.path(), name, "is missing: this is no prompt cache");
  const TensorEntry& entry = found->second;
  if (shape[0] < 0 && !entry.shape.empty()) shape[0] = entry.shape[0];
  if (entry.dtype != dtype_name(like) || entry.shape != shape) {
    throw LoadError(file.path(), name, "has another type or shape than this model and its pages");
  }
  torch::Tensor tensor = torch::empty(shape, like.options().device(torch::kCPU));
  file.read(entry.begin, tensor.data_ptr(), tensor.nbytes());
  return tensor;
}

}  // namespace

void write_prompt_cache(const PromptCache& saved, const MixtralImpl& model, const fs::path& path) {
  NamedTensors tensors = {{"model", fingerprint_of(model)}, {"token_ids", torch::tensor(saved.ids, torch::kInt64)}};
  for (size_t layer = 0; layer < saved.contents.keys.size(); ++layer) {
    tensors.emplace_back("keys." + std::to_string(layer), saved.contents.keys[layer].contiguous());
    tensors.emplace_back("values." + std::to_string(layer), saved.contents.values[layer].contiguous());
  }
  replace_file(path, [&tensors](OutputFile& file) { write_tensors(tensors, file); });
}

PromptCache read_prompt_cache(const MixtralImpl& model, int64_t page_size, const fs::path& path) {
  const TensorFile file = open_safetensors(path);
  const Config& config = model.config();
  const torch::Tensor expected = fingerprint_of(model);
  if (!read_tensor(file, "model", expected, expected.sizes().vec()).equal(expected)) {
    throw LoadError(file.path(), "", "is the prompt cache of another model, type or device: name another file");
  }
  const auto ids = read_tensor(file, "token_ids", torch::empty({0}, torch::kInt64), {-1});
  PromptCache saved;
  saved.ids.assign(ids.data_ptr<int64_t>(), ids.data_ptr<int64_t>() + ids.numel());
  saved.contents.length = ids.numel();
  const torch::Tensor like = torch::empty({0}, model.dtype());
  int64_t pages = -1;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    for (const auto& [name, list] :
         {std::pair("keys.", &saved.contents.keys), std::pair("values.", &saved.contents.values)}) {
      list->push_back(read_tensor(file, name + std::to_string(layer), like,
                                  {pages, page_size, config.num_kv_heads, config.head_dim}));
      pages = list->back().size(0);
    }
  }
  try {
    model.check_ids(saved.ids.data(), ids.numel());
  } catch (const std::exception& e) {
    throw LoadError(file.path(), "token_ids", e.what());
  }
  return saved;
}

}  // namespace mixtral
