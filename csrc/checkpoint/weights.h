// From the tensors of a checkpoint folder to the parameters of the model: names, layouts, shapes.
//
// Parameter names (torch::nn::Module paths) and shapes, in the project's letters:
//   embed_tokens [vocab,H]                        norm [H]                      lm_head [vocab,H]
//   layers.N.input_layernorm [H]                  layers.N.post_attention_layernorm [H]
//   layers.N.attention.qkv_proj [(Nq+2Nkv)*D,H]   layers.N.attention.o_proj [H,Nq*D]
//   layers.N.moe.router [E,H] (f32, or the model's dtype when router_in_f32 is false)
//   layers.N.moe.gate_up_proj [E,2I,H]            layers.N.moe.down_proj [E,H,I]
// A dense model has layers.N.mlp.gate_up_proj [1,2I,H] and layers.N.mlp.down_proj [1,H,I] instead of `moe`.
// With tie_word_embeddings, lm_head is the same tensor as embed_tokens and is not read.
//
// When packed (packing.h), a matrix is what pack_weight makes of it, a dense one with E = 1. A quantised checkpoint
// (save.h) holds the parameters themselves, under these names.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <string>
#include <vector>

#include "../io/safetensors.h"
#include "../model/config.h"
#include "../model/packing.h"
#include "weight_names.h"

namespace mixtral {

// The name that a parameter's type has in the files of a quantised model.
const char* safetensors_dtype(torch::ScalarType type);

// Called while weights are read: bytes done, bytes in all.
using LoadProgress = std::function<void(uint64_t done, uint64_t total)>;

// A checkpoint whose files are open and whose tensors all exist with the shapes that `config` asks for.
class Checkpoint {
 public:
  // Hugging Face (v4 or v5 names, one file or shards with an index) or consolidated. Throws LoadError.
  Checkpoint(const std::filesystem::path& folder, const Config& config);

  uint64_t bytes() const;  // to be read

  // Fills the given parameters, all or some, in place, converting dtype and layout, packing and quantising through a
  // small staging buffer. Progress is in bytes of the whole checkpoint.
  void read_into(const torch::OrderedDict<std::string, torch::Tensor>& parameters, Packing packing,
                 const LoadProgress& progress) const;

 private:
  // One tensor of the checkpoint, and the rows of the parameter it becomes.
  struct Source {
    size_t file;  // index into files_
    SafetensorsEntry entry;
    WeightSlice slice;
  };
  std::vector<SafetensorsFile> files_;
  std::vector<Source> sources_;  // in file order
};

}  // namespace mixtral
