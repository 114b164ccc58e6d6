#include "weights.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "../io/ggml_type.h"
#include "../io/json.h"
#include "../io/load_error.h"
#include "../io/nearest.h"
#include "files.h"
#include "folder.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

const std::string kTakeOriginal = ": take the checkpoint that is not quantised; `mixtral quantize` makes it small";

torch::ScalarType scalar_type(const TensorFile& file, const WeightSlice& slice, const TensorEntry& entry) {
  if (slice.packed) {
    const std::string expected = safetensors_dtype(*slice.packed);
    if (entry.dtype == expected) return *slice.packed;
    throw LoadError(file.path(), slice.tensor, "dtype must be " + expected + ", got " + entry.dtype);
  }
  if (const auto type = float_type(entry.dtype)) return *type;
  if (is_ggml_quantized(entry.dtype)) return torch::kFloat32;  // what its blocks become
  throw LoadError(file.path(), slice.tensor, "dtype must be F32, BF16 or F16, got " + entry.dtype);
}

// What a rank holds of each parameter, by name.
class Shards {
 public:
  Shards(const Config& config, const Placement& placement) {
    for (Parameter& parameter : placed_parameters(config, placement)) {
      const std::string name = parameter.name;
      ParameterShard shard = shard_of(parameter, config, placement);
      shards_.emplace(name, std::pair(std::move(parameter), std::move(shard)));
    }
  }

  // None: the rank holds nothing of it.
  std::vector<WeightPart> parts(const WeightSlice& slice) const {
    const auto found = shards_.find(slice.parameter);
    if (found == shards_.end()) return {};
    return parts_of(slice, found->second.first, found->second.second);
  }

 private:
  std::map<std::string, std::pair<Parameter, ParameterShard>> shards_;
};

// Blocks of a GGUF file are a run of columns.
void check_whole_blocks(const TensorFile& file, const std::string& tensor, const TensorEntry& entry,
                        const std::vector<WeightPart>& parts) {
  const int64_t block = ggml_block_size(entry.dtype);
  for (const WeightPart& part : parts) {
    if (part.first_column % block == 0 && part.columns % block == 0) continue;
    throw LoadError(file.path(), tensor,
                    std::to_string(part.columns) + " of its columns are for one rank, but " + entry.dtype +
                        " has blocks of " + std::to_string(block) + ": use expert parallelism or fewer ranks");
  }
}

bool ends_in(const std::string& name, const std::string& end) {
  return name.size() > end.size() && name.compare(name.size() - end.size() - 1, std::string::npos, "." + end) == 0;
}

// Why a tensor is missing: it has another prefix or a similar name, or is quantised in a way of others.
std::string missing(const std::string& tensor, const std::map<std::string, size_t>& where) {
  if (where.count(tensor.substr(0, tensor.rfind('.')) + ".qweight")) {
    return "tensor is missing: the weights are quantised by AWQ or GPTQ, which is not supported" + kTakeOriginal;
  }
  const std::string tail = tensor.rfind("model.", 0) == 0 ? tensor.substr(6) : tensor;
  std::vector<std::string> names;
  std::string near;
  for (const auto& [name, file] : where) {
    names.push_back(name);
    if (near.empty() && (ends_in(name, tail) || ends_in(tensor, name))) near = name;
  }
  if (near.empty()) near = nearest(tensor, names);
  return "tensor is missing" + (near.empty() ? "" : "; the nearest name in the files is " + shown(near));
}

// A tensor inside a layer that the model does not have (a bias, an expert or a layer too many) would be left out of the
// computation in silence. Rotary tables of old checkpoints are ignored, for the ops compute them; so are tensors
// outside the layers, such as heads of other tasks.
void check_unexpected(const TensorFile& file, const std::set<std::string>& expected) {
  const std::string rotary_table = "rotary_emb.inv_freq";
  for (const auto& [tensor, entry] : file.entries()) {
    const size_t tail = tensor.size() - std::min(tensor.size(), rotary_table.size());
    const bool in_layer =
        tensor.rfind("layers.", 0) == 0 || tensor.rfind("model.layers.", 0) == 0 || tensor.rfind("blk.", 0) == 0;
    if (!in_layer || expected.count(tensor) || tensor.compare(tail, std::string::npos, rotary_table) == 0) continue;
    if (tensor.find(".lora_A.") != std::string::npos || tensor.find(".lora_B.") != std::string::npos)
      throw LoadError(file.path(), tensor,
                      "is of an adapter that was not merged into the weights before they were saved");
    throw LoadError(file.path(), tensor, "is not part of the model that the configuration describes");
  }
}

}  // namespace

const char* safetensors_dtype(torch::ScalarType type) {
  switch (type) {
    case torch::kInt8:
      return "I8";
    case torch::kFloat8_e4m3fn:
      return "F8_E4M3";
    case torch::kUInt8:
      return "U8";
    case torch::kFloat32:
      return "F32";
    case torch::kFloat16:
      return "F16";
    default:
      return "BF16";  // the activations of a quantised model
  }
}

std::optional<torch::ScalarType> float_type(const std::string& safetensors_dtype) {
  if (safetensors_dtype == "F32") return torch::kFloat32;
  if (safetensors_dtype == "BF16") return torch::kBFloat16;
  if (safetensors_dtype == "F16") return torch::kFloat16;
  return std::nullopt;
}

std::string shape_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + "]";
}

torch::Tensor half_split(const torch::Tensor& rows, int64_t interleaved_head_dim) {
  if (interleaved_head_dim == 0) return rows;
  const int64_t half = interleaved_head_dim / 2, cols = rows.size(1);
  return rows.view({-1, half, 2, cols}).transpose(1, 2).reshape({-1, cols});
}

Checkpoint::Checkpoint(const fs::path& folder, const Config& config, const LoadOptions& options)
    : files_(open_files(folder, config.layout, options.warn)), check_finite_(options.check_weights) {
  if (!options.lora.empty() && !config.quantization.empty()) {
    throw std::invalid_argument("lora needs a checkpoint that is not quantised, got " + config.quantization +
                                ": quantise the original with `mixtral quantize MODEL OUT --lora FOLDER`");
  }
  options.placement.check(config);
  if (options.weights == Weights::kDirect) read_directly(options.warn);
  const Shards shards(config, options.placement);
  std::map<std::string, size_t> where;  // tensor -> index of its file
  std::map<std::string, size_t> twice;  // the same of a second one
  for (size_t f = 0; f < files_.size(); ++f) {
    for (const auto& [tensor, entry] : files_[f].entries())
      if (!where.emplace(tensor, f).second) twice[tensor] = f;
  }
  const bool merged = where.count("model.layers.0.mlp.experts.gate_up_proj") > 0;
  const bool stacked = where.count("layers.0.block_sparse_moe.w1") > 0;
  const bool gguf_merged = where.count("blk.0.ffn_gate_exps.weight") > 0;
  const WeightNames names =
      !config.quantization.empty()                       ? WeightNames::kParameters
      : config.layout == CheckpointLayout::kConsolidated ? stacked ? WeightNames::kStacked : WeightNames::kConsolidated
      : config.layout == CheckpointLayout::kGguf         ? gguf_merged ? WeightNames::kGgufMerged : WeightNames::kGguf
      : merged                                           ? WeightNames::kHuggingFaceMerged
                                                         : WeightNames::kHuggingFace;
  std::set<std::string> expected;
  visit_weight_slices(config, names, [&](WeightSlice slice) {
    const auto found = where.find(slice.tensor);
    if (found == where.end()) throw LoadError(folder.string(), slice.tensor, missing(slice.tensor, where));
    const TensorFile& file = files_[found->second];
    if (const auto second = twice.find(slice.tensor); second != twice.end())
      throw LoadError(file.path(), slice.tensor, "is in " + files_[second->second].path() + " too");
    const TensorEntry& entry = file.entries().at(slice.tensor);
    if (where.count(slice.tensor + ".absmax"))
      throw LoadError(file.path(), slice.tensor,
                      "is quantised by bitsandbytes, which is not supported" + kTakeOriginal);
    const torch::ScalarType type = scalar_type(file, slice, entry);
    if (entry.shape != slice.shape) {
      const std::string empty =
          entry.begin == entry.end ? ": DeepSpeed ZeRO-3 saved it without gathering it first" : "";
      throw LoadError(file.path(), slice.tensor,
                      "shape must be " + shape_string(slice.shape) + ", got " + shape_string(entry.shape) + empty);
    }
    expected.insert(slice.tensor);
    std::vector<WeightPart> parts = shards.parts(slice);
    if (parts.empty()) return;  // another rank's
    check_whole_blocks(file, slice.tensor, entry, parts);
    sources_.push_back({found->second, entry, std::move(slice), std::move(parts), type});
  });
  for (const TensorFile& file : files_) check_unexpected(file, expected);
  std::sort(sources_.begin(), sources_.end(), [](const Source& a, const Source& b) {
    return std::tuple(a.file, a.entry.begin, a.parts[0].first_row) <
           std::tuple(b.file, b.entry.begin, b.parts[0].first_row);
  });
  if (!options.lora.empty()) adapter_.emplace(find_model(options.lora), config);
}

void Checkpoint::read_directly(const Warn& warn) {
  for (TensorFile& file : files_) {
    if (file.read_directly() || !warn) continue;
    return warn("weights direct: the file system of " + file.path() +
                " cannot read past the memory of the system (O_DIRECT); the weights are read as with weights read");
  }
}

StoredRows Checkpoint::stored(const Source& source, const WeightPart& part) const {
  return {files_[source.file], source.entry, source.slice, part, source.type};
}

uint64_t Checkpoint::bytes() const {
  uint64_t bytes = 0;
  for (const Source& source : sources_)
    for (const WeightPart& part : source.parts)
      bytes += static_cast<uint64_t>(part.rows) * stored(source, part).row_bytes();
  return bytes;
}

void Checkpoint::read_into(const torch::OrderedDict<std::string, torch::Tensor>& parameters, Packing packing,
                           const Progress& progress) const {
  const torch::NoGradGuard no_grad;
  RowReader reader(progress, bytes(), adapter_ ? &*adapter_ : nullptr, check_finite_);
  for (const Source& source : sources_) {
    const torch::Tensor* const parameter = parameters.find(source.slice.parameter);
    if (!parameter) continue;
    const bool transposed = source.slice.transposed;
    for (const WeightPart& part : source.parts) {
      const int64_t rows = transposed ? part.columns : part.rows, cols = transposed ? part.rows : part.columns;
      if (is_packed(*parameter) && !source.slice.packed) {
        const auto blocks = parameter->flatten(0, 1);
        reader.read(stored(source, part), packing, blocks.narrow(0, part.own_row / kPackedRows, rows / kPackedRows));
      } else {
        reader.read(stored(source, part), Packing::kNone, parameter->view({-1, cols}).narrow(0, part.own_row, rows));
      }
    }
  }
}

}  // namespace mixtral
