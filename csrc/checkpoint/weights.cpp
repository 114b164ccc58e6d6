#include "weights.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "../io/load_error.h"
#include "files.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kStagingBytes = 4 << 20;
constexpr uint64_t kProgressBytes = 64 << 20;

std::string shape_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + "]";
}

// ---- from tensors to slices

torch::ScalarType scalar_type(const TensorFile& file, const WeightSlice& slice, const TensorEntry& entry) {
  if (slice.packed) {
    const std::string expected = safetensors_dtype(*slice.packed);
    if (entry.dtype == expected) return *slice.packed;
    throw LoadError(file.path(), slice.tensor, "dtype must be " + expected + ", got " + entry.dtype);
  }
  if (entry.dtype == "F32") return torch::kFloat32;
  if (entry.dtype == "BF16") return torch::kBFloat16;
  if (entry.dtype == "F16") return torch::kFloat16;
  throw LoadError(file.path(), slice.tensor, "dtype must be F32, BF16 or F16, got " + entry.dtype);
}

// A tensor inside a layer that the model does not have (a bias, an expert or a layer too many) would be left out of the
// computation in silence. Rotary tables of old checkpoints are ignored, for the ops compute them; so are tensors
// outside the layers, such as heads of other tasks.
void check_unexpected(const TensorFile& file, const std::set<std::string>& expected) {
  const std::string rotary_table = "rotary_emb.inv_freq";
  for (const auto& [tensor, entry] : file.entries()) {
    const size_t tail = tensor.size() - std::min(tensor.size(), rotary_table.size());
    const bool in_layer = tensor.rfind("layers.", 0) == 0 || tensor.rfind("model.layers.", 0) == 0;
    if (in_layer && !expected.count(tensor) && tensor.compare(tail, std::string::npos, rotary_table) != 0) {
      throw LoadError(file.path(), tensor, "is not part of the model that the configuration describes");
    }
  }
}

// ---- from slices to parameters

// Reads runs of rows, and reports progress about every kProgressBytes.
class RowReader {
 public:
  RowReader(const Progress& progress, uint64_t total) : progress_(progress), total_(total) {}

  // out: the rows of the parameter that the slice becomes, [rows,cols], on any device; or, with packing, their packed
  // blocks [rows/32,...].
  void read(const TensorFile& file, const TensorEntry& entry, const WeightSlice& slice, torch::ScalarType type,
            Packing packing, const torch::Tensor& out) {
    const int64_t rows = slice.rows(), block = packing == Packing::kNone ? 1 : rows / out.size(0);
    const int64_t group = std::lcm(std::max<int64_t>(slice.interleaved_head_dim, 1), block);
    const int64_t row_bytes = slice.cols() * static_cast<int64_t>(c10::elementSize(type));
    const int64_t step = std::max<int64_t>(kStagingBytes / (row_bytes * group), 1) * group;
    const bool direct = out.is_cpu() && out.scalar_type() == type && slice.interleaved_head_dim == 0 && block == 1;
    for (int64_t row = 0; row < rows; row += step) {
      const int64_t count = std::min(step, rows - row), bytes = count * row_bytes;
      const torch::Tensor part = out.narrow(0, row / block, count / block);
      void* to = direct ? part.data_ptr() : staging(bytes);
      file.read(entry.begin + static_cast<uint64_t>(row * row_bytes), to, static_cast<uint64_t>(bytes));
      if (!direct) {
        const auto source = in_order(torch::from_blob(to, {count, slice.cols()}, type), slice.interleaved_head_dim);
        part.copy_(packing == Packing::kNone ? source : pack(file, slice, source, packing, out.scalar_type()));
      }
      report(static_cast<uint64_t>(bytes));
    }
  }

 private:
  // rows [n,cols], rotary pairs brought to the half-split order
  static torch::Tensor in_order(const torch::Tensor& rows, int64_t interleaved_head_dim) {
    if (interleaved_head_dim == 0) return rows;
    const int64_t half = interleaved_head_dim / 2, cols = rows.size(1);
    return rows.view({-1, half, 2, cols}).transpose(1, 2).reshape({-1, cols});
  }

  static torch::Tensor pack(const TensorFile& file, const WeightSlice& slice, const torch::Tensor& rows,
                            Packing packing, torch::ScalarType type) {
    if (packing == Packing::kFloat) return pack_rows(rows.to(type), packing);
    if (!torch::isfinite(rows).all().item<bool>()) {
      throw LoadError(file.path(), slice.tensor, "must be finite to be quantised, got inf or NaN");
    }
    return pack_rows(rows, packing);
  }

  void* staging(int64_t bytes) {
    if (!staging_.defined() || staging_.numel() < bytes) staging_ = torch::empty({bytes}, torch::kUInt8);
    return staging_.data_ptr();
  }

  void report(uint64_t bytes) {
    done_ += bytes;
    if (progress_ && (done_ == total_ || done_ - reported_ >= kProgressBytes)) progress_(reported_ = done_, total_);
  }

  const Progress& progress_;
  const uint64_t total_;
  uint64_t done_ = 0, reported_ = 0;
  torch::Tensor staging_;
};

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
    default:
      return "BF16";  // the activations of a quantised model
  }
}

Checkpoint::Checkpoint(const fs::path& folder, const Config& config) : files_(open_files(folder, config.layout)) {
  std::map<std::string, size_t> where;  // tensor -> index of its file
  for (size_t f = 0; f < files_.size(); ++f) {
    for (const auto& [tensor, entry] : files_[f].entries()) where[tensor] = f;
  }
  const bool merged = where.count("model.layers.0.mlp.experts.gate_up_proj") > 0;
  const WeightNames names = !config.quantization.empty()                       ? WeightNames::kParameters
                            : config.layout == CheckpointLayout::kConsolidated ? WeightNames::kConsolidated
                            : merged                                           ? WeightNames::kHuggingFaceMerged
                                                                               : WeightNames::kHuggingFace;
  std::set<std::string> expected;
  for (WeightSlice& slice : weight_slices(config, names)) {
    const auto found = where.find(slice.tensor);
    if (found == where.end()) throw LoadError(folder.string(), slice.tensor, "tensor is missing");
    const TensorFile& file = files_[found->second];
    const TensorEntry& entry = file.entries().at(slice.tensor);
    scalar_type(file, slice, entry);
    if (entry.shape != slice.shape) {
      throw LoadError(file.path(), slice.tensor,
                      "shape must be " + shape_string(slice.shape) + ", got " + shape_string(entry.shape));
    }
    expected.insert(slice.tensor);
    sources_.push_back({found->second, entry, std::move(slice)});
  }
  for (const TensorFile& file : files_) check_unexpected(file, expected);
  std::sort(sources_.begin(), sources_.end(), [](const Source& a, const Source& b) {
    return std::pair(a.file, a.entry.begin) < std::pair(b.file, b.entry.begin);
  });
}

uint64_t Checkpoint::bytes() const {
  uint64_t bytes = 0;
  for (const Source& source : sources_) bytes += source.entry.end - source.entry.begin;
  return bytes;
}

void Checkpoint::read_into(const torch::OrderedDict<std::string, torch::Tensor>& parameters, Packing packing,
                           const Progress& progress) const {
  const torch::NoGradGuard no_grad;
  RowReader reader(progress, bytes());
  for (const auto& [file, entry, slice] : sources_) {
    const torch::Tensor* const wanted = parameters.find(slice.parameter);
    if (!wanted) continue;
    const torch::Tensor& parameter = *wanted;
    const torch::ScalarType type = scalar_type(files_[file], slice, entry);
    if (is_packed(parameter) && !slice.packed) {
      const auto blocks = parameter.flatten(0, 1);
      reader.read(files_[file], entry, slice, type, packing,
                  blocks.narrow(0, slice.first_row / kPackedRows, slice.rows() / kPackedRows));
    } else {
      const auto rows = parameter.view({-1, slice.cols()});
      reader.read(files_[file], entry, slice, type, Packing::kNone, rows.narrow(0, slice.first_row, slice.rows()));
    }
  }
}

}  // namespace mixtral
