// The names and shapes of a checkpoint's tensors in each of its spellings, and where their rows go in the model.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "../model/config.h"
#include "../model/libtorch.h"

namespace mixtral {

enum class WeightNames {
  kHuggingFace,        // one tensor per expert: transformers v4, and v5 by default
  kHuggingFaceMerged,  // all experts in one tensor: transformers v5 with save_original_format=False
  kConsolidated,       // Mistral's own
  kStacked,            // Mistral's first release of Mixtral: all experts' w1, w2 or w3 in one tensor, w2 transposed
  kGguf,               // one tensor per expert: GGUF files until spring 2024
  kGgufMerged,         // all experts in one tensor: GGUF files since then
  kParameters,         // the model's parameters as they are: a quantised checkpoint (save.h)
};

// A checkpoint tensor and the rows it fills. Matrices are seen as [rows, cols] with cols the last dimension, vectors as
// one row: every tensor is then a run of whole rows of one parameter.
struct WeightSlice {
  std::string tensor;          // in the checkpoint
  std::vector<int64_t> shape;  // of `tensor`
  std::string parameter;       // its name in model/parameters.h
  int64_t first_row = 0;       // in the parameter
  // > 0: rows come in rotary pairs (0,1), (2,3), ... of each head of this size, and go to the half-split order
  // 0, 2, 4, ..., 1, 3, 5, ...
  int64_t interleaved_head_dim = 0;
  std::optional<torch::ScalarType> packed = {};  // of quantised blocks, which go to the parameter unchanged
  // Where the tensor holds more than one matrix: the rows of one, and whether they are columns of the parameter.
  int64_t first_tensor_row = 0;
  int64_t tensor_rows = 0;  // 0: all
  bool transposed = false;

  int64_t cols() const { return shape.back(); }
  int64_t rows() const;
};

// Calls `visit` with every tensor that a checkpoint of `config` must have, or every matrix in it. A configuration may
// ask for millions, so they are made one by one.
void visit_weight_slices(const Config& config, WeightNames names, const std::function<void(WeightSlice)>& visit);
// The same as a list, for a configuration whose tensors are known to exist.
std::vector<WeightSlice> weight_slices(const Config& config, WeightNames names);

}  // namespace mixtral
