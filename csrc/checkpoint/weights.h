// From the tensors of a checkpoint folder to the parameters of the model: names, layouts, shapes.
// The parameters and their shapes are listed in model/parameters.h. A quantised checkpoint (save.h) holds the packed
// parameters themselves, under these names.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "../io/tensor_file.h"
#include "../model/config.h"
#include "../model/libtorch.h"
#include "../model/packing.h"
#include "load_options.h"
#include "lora.h"
#include "mapped_weights.h"
#include "row_reader.h"
#include "weight_names.h"
#include "weight_parts.h"

namespace mixtral {

// The name that a parameter's type has in the files of a quantised model.
const char* safetensors_dtype(torch::ScalarType type);

// "F32", "BF16" or "F16", else nothing.
std::optional<torch::ScalarType> float_type(const std::string& safetensors_dtype);

// "[32000, 4096]"
std::string shape_string(const std::vector<int64_t>& shape);

// rows [n,cols] of whole heads, rotary pairs (0,1), (2,3), ... brought to the half-split order. 0: they have it
// already.
torch::Tensor half_split(const torch::Tensor& rows, int64_t interleaved_head_dim);

// A checkpoint whose files are open and whose tensors all exist with the shapes that `config` asks for.
class Checkpoint {
 public:
  // Hugging Face (v4 or v5 names, one file or shards) or consolidated, with the adapter, if there is one, merged into
  // what is read, which is what the rank of options.placement holds. Throws LoadError; std::invalid_argument for an
  // adapter over quantised weights and for a model that cannot be cut that way.
  Checkpoint(const std::filesystem::path& folder, const Config& config, const LoadOptions& options = {});

  uint64_t bytes() const;  // to be read
  const std::vector<TensorFile>& files() const { return files_; }

  // Fills the given parameters, all or some, in place, converting dtype and layout, packing and quantising through a
  // small staging buffer. They have the shapes of the rank, and the names of the whole model. Progress is in bytes of
  // all that the rank reads. Throws LoadError for a value that is not
  // finite, if the options ask for that or it is to be quantised.
  void read_into(const torch::OrderedDict<std::string, torch::Tensor>& parameters, Packing packing,
                 const Progress& progress) const;

  // Maps the files and makes views of them where their bytes are those of the parameters, which are then for the CPU.
  // Throws std::invalid_argument where an expert or the dense block is none, with what to do; LoadError.
  MappedWeights map(const Config& config, const WeightType& type, const Placement& placement = {}) const;

 private:
  // One tensor of the checkpoint, and what of it the rank reads.
  struct Source {
    size_t file;  // index into files_
    TensorEntry entry;
    WeightSlice slice;
    std::vector<WeightPart> parts;
    torch::ScalarType type;
  };
  void read_directly(const Warn& warn);
  StoredRows stored(const Source& source, const WeightPart& part) const;
  struct Piece;
  std::string why_converted(const Piece& piece, const torch::Tensor& meta) const;
  std::string why_not_a_view(const std::vector<Piece>& pieces, const torch::Tensor& meta) const;

  std::vector<TensorFile> files_;
  std::vector<Source> sources_;  // in file order
  std::optional<Adapter> adapter_;
  const bool check_finite_;
};

}  // namespace mixtral
