#include "convert.h"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>

#include "../io/json.h"
#include "../io/safetensors_writer.h"
#include "../model/weight_type.h"
#include "config_reader.h"
#include "output_folder.h"
#include "save.h"
#include "weights.h"

namespace mixtral {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kWriteBytes = 64 << 20;  // between two calls of the progress

// One safetensors file of the result.
struct Shard {
  std::string name;
  std::vector<WeightSlice> slices;  // in the order of the model's parameters
  uint64_t bytes = 0;
};

std::vector<Shard> make_shards(const Config& config, uint64_t element_size, uint64_t max_bytes) {
  std::vector<Shard> shards(1);
  for (WeightSlice& slice : weight_slices(config, WeightNames::kHuggingFace)) {
    const uint64_t bytes = static_cast<uint64_t>(slice.rows() * slice.cols()) * element_size;
    if (shards.back().bytes > 0 && shards.back().bytes + bytes > max_bytes) shards.emplace_back();
    shards.back().slices.push_back(std::move(slice));
    shards.back().bytes += bytes;
  }
  const auto five_digits = [](size_t number) {
    const std::string digits = std::to_string(number);
    return std::string(5 - std::min<size_t>(digits.size(), 5), '0') + digits;
  };
  for (size_t i = 0; i < shards.size(); ++i) {
    shards[i].name = shards.size() == 1
                         ? "model.safetensors"
                         : "model-" + five_digits(i + 1) + "-of-" + five_digits(shards.size()) + ".safetensors";
  }
  return shards;
}

std::string index_json(const std::vector<Shard>& shards) {
  nlohmann::json map;
  uint64_t bytes = 0;
  for (const Shard& shard : shards) {
    for (const WeightSlice& slice : shard.slices) map[slice.tensor] = shard.name;
    bytes += shard.bytes;
  }
  return nlohmann::json{{"metadata", {{"total_size", bytes}}}, {"weight_map", map}}.dump(2) + "\n";
}

// Reads the parameters one after the other, each when the first of its rows is to be written.
class Writer {
 public:
  Writer(const Checkpoint& checkpoint, const Config& config, torch::ScalarType type, const Progress& progress)
      : checkpoint_(checkpoint), parameters_(model_parameters(config)), type_(type), progress_(progress) {}

  void write(const std::vector<Shard>& shards, const fs::path& folder) {
    for (const Shard& shard : shards) total_ += shard.bytes;
    for (const Shard& shard : shards) write(shard, folder / shard.name);
  }

 private:
  void write(const Shard& shard, const fs::path& path) {
    std::vector<StoredTensor> tensors;
    for (const WeightSlice& slice : shard.slices) {
      const auto elements = static_cast<uint64_t>(slice.rows() * slice.cols());
      tensors.push_back({slice.tensor, safetensors_dtype(type_), slice.shape, elements * c10::elementSize(type_)});
    }
    OutputFile file(path);
    const std::string header = safetensors_header(tensors, {}, kPageBytes);
    file.write(header.data(), header.size());
    for (const WeightSlice& slice : shard.slices) {
      const torch::Tensor rows =
          parameter(slice.parameter).view({-1, slice.cols()}).narrow(0, slice.first_row, slice.rows());
      write(rows, file);
    }
    file.close();
  }

  void write(const torch::Tensor& rows, OutputFile& file) {
    const char* data = static_cast<const char*>(rows.data_ptr());
    for (uint64_t begin = 0; begin < rows.nbytes(); begin += kWriteBytes) {
      const uint64_t bytes = std::min(kWriteBytes, rows.nbytes() - begin);
      file.write(data + begin, bytes);
      if (progress_) progress_(done_ += bytes, total_);
    }
  }

  const torch::Tensor& parameter(const std::string& name) {
    if (!current_.contains(name)) {
      const auto found = std::find_if(parameters_.begin(), parameters_.end(),
                                      [&](const Parameter& parameter) { return parameter.name == name; });
      current_.clear();
      current_.insert(name, torch::empty(found->shape, type_));
      checkpoint_.read_into(current_, Packing::kNone, nullptr);
    }
    return current_[name];
  }

  const Checkpoint& checkpoint_;
  const std::vector<Parameter> parameters_;
  const torch::ScalarType type_;
  const Progress& progress_;
  torch::OrderedDict<std::string, torch::Tensor> current_;  // one parameter
  uint64_t done_ = 0, total_ = 0;
};

Config converted_config(const fs::path& source, const LoadOptions& options) {
  Config config = read_config(source, options.warn);
  if (!config.quantization.empty()) {
    const bool quantized = is_quantized(parse_weight_type("auto", config).packing);
    throw std::invalid_argument("convert: " + source.string() + " is " +
                                (quantized ? "quantised to " + config.quantization + " and has lost its numbers"
                                           : "packed as " + config.quantization) +
                                "; convert the checkpoint that it was made from");
  }
  const std::string& dtype = options.dtype;
  if (dtype != "auto" && dtype != "float32" && dtype != "bfloat16" && dtype != "float16") {
    throw std::invalid_argument("convert: dtype must be auto, float32, bfloat16 or float16, got " + dtype);
  }
  if (dtype != "auto") config.dtype = dtype;
  return config;
}

}  // namespace

void convert(const fs::path& source, const fs::path& folder, const LoadOptions& options, uint64_t max_shard_bytes) {
  check_unused(folder);
  const Config config = converted_config(source, options);
  const Checkpoint checkpoint(source, config, options);
  const torch::ScalarType type = scalar_type(config.dtype);
  const std::vector<Shard> shards = make_shards(config, c10::elementSize(type), max_shard_bytes);
  try {
    NewFolder incomplete(folder);
    write_text(incomplete.path() / "config.json", config_json(config));
    carry_files(source, incomplete.path());
    if (shards.size() > 1) write_text(incomplete.path() / "model.safetensors.index.json", index_json(shards));
    Writer(checkpoint, config, type, options.progress).write(shards, incomplete.path());
    incomplete.finish();
  } catch (const fs::filesystem_error& error) {
    throw std::runtime_error(folder.string() + ": cannot be written: " + error.code().message());
  }
}

}  // namespace mixtral
