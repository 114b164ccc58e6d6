// From the tensors of a checkpoint folder to the parameters of the model: names, layouts, shapes.
// The parameters and their shapes are listed in model/parameters.h. A quantised checkpoint (save.h) holds the packed
// parameters themselves, under these names.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "../io/tensor_file.h"
#include "../model/config.h"
#include "../model/libtorch.h"
#include "../model/packing.h"
#include "load_options.h"
#include "weight_names.h"

namespace mixtral {

// The name that a parameter's type has in the files of a quantised model.
const char* safetensors_dtype(torch::ScalarType type);

// A checkpoint whose files are open and whose tensors all exist with the shapes that `config` asks for.
class Checkpoint {
 public:
  // Hugging Face (v4 or v5 names, one file or shards with an index) or consolidated. Throws LoadError.
  Checkpoint(const std::filesystem::path& folder, const Config& config);

  uint64_t bytes() const;  // to be read

  // Fills the given parameters, all or some, in place, converting dtype and layout, packing and quantising through a
  // small staging buffer. Progress is in bytes of the whole checkpoint.
  void read_into(const torch::OrderedDict<std::string, torch::Tensor>& parameters, Packing packing,
                 const Progress& progress) const;

 private:
  // One tensor of the checkpoint, and the rows of the parameter it becomes.
  struct Source {
    size_t file;  // index into files_
    TensorEntry entry;
    WeightSlice slice;
  };
  std::vector<TensorFile> files_;
  std::vector<Source> sources_;  // in file order
};

}  // namespace mixtral
