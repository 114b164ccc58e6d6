#include "weights.h"

#include <algorithm>
#include <set>
#include <stdexcept>

#include "../io/ggml_type.h"
#include "../io/json.h"
#include "../io/load_error.h"
#include "../io/nearest.h"
#include "files.h"
#include "folder.h"
#include "row_reader.h"

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

// The bytes of the slice's rows alone.
TensorEntry rows_of(TensorEntry entry, const WeightSlice& slice) {
  if (slice.tensor_rows == 0) return entry;
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < entry.shape.size(); ++d) rows *= entry.shape[d];
  const uint64_t row_bytes = (entry.end - entry.begin) / static_cast<uint64_t>(rows);
  entry.begin += static_cast<uint64_t>(slice.first_tensor_row) * row_bytes;
  entry.end = entry.begin + static_cast<uint64_t>(slice.tensor_rows) * row_bytes;
  return entry;
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
    scalar_type(file, slice, entry);
    if (entry.shape != slice.shape) {
      const std::string empty =
          entry.begin == entry.end ? ": DeepSpeed ZeRO-3 saved it without gathering it first" : "";
      throw LoadError(file.path(), slice.tensor,
                      "shape must be " + shape_string(slice.shape) + ", got " + shape_string(entry.shape) + empty);
    }
    expected.insert(slice.tensor);
    sources_.push_back({found->second, rows_of(entry, slice), std::move(slice)});
  });
  for (const TensorFile& file : files_) check_unexpected(file, expected);
  std::sort(sources_.begin(), sources_.end(), [](const Source& a, const Source& b) {
    return std::pair(a.file, a.entry.begin) < std::pair(b.file, b.entry.begin);
  });
  if (!options.lora.empty()) adapter_.emplace(find_model(options.lora), config);
}

uint64_t Checkpoint::bytes() const {
  uint64_t bytes = 0;
  for (const Source& source : sources_) bytes += source.entry.end - source.entry.begin;
  return bytes;
}

void Checkpoint::read_into(const torch::OrderedDict<std::string, torch::Tensor>& parameters, Packing packing,
                           const Progress& progress) const {
  const torch::NoGradGuard no_grad;
  RowReader reader(progress, bytes(), adapter_ ? &*adapter_ : nullptr, check_finite_);
  for (const auto& [file, entry, slice] : sources_) {
    const torch::Tensor* const wanted = parameters.find(slice.parameter);
    if (!wanted) continue;
    const torch::Tensor& parameter = *wanted;
    const int64_t rows = slice.transposed ? slice.cols() : slice.rows();
    const StoredRows stored{files_[file], entry, slice, scalar_type(files_[file], slice, entry)};
    if (is_packed(parameter) && !slice.packed) {
      const auto blocks = parameter.flatten(0, 1);
      reader.read(stored, packing, blocks.narrow(0, slice.first_row / kPackedRows, rows / kPackedRows));
    } else {
      const auto matrix = parameter.view({-1, slice.transposed ? slice.rows() : slice.cols()});
      reader.read(stored, Packing::kNone, matrix.narrow(0, slice.first_row, rows));
    }
  }
}

}  // namespace mixtral
