// How the weight matrices of a model lie in memory: as in the checkpoint, or in the packed formats
// (csrc/ops/pack_weight/pack_weight.h), which are read faster and may be quantised.
//
// Packed are the matrices of attention and of the experts, and lm_head where the vocabulary is a multiple of 32.
// Router, norms and embeddings (and an lm_head that is the embeddings) never are.
#pragma once

#include <torch/torch.h>

#include <string>
#include <vector>

#include "config.h"

namespace mixtral {

enum class Packing { kNone, kFloat, kInt8, kFp8, kInt4 };

inline constexpr int64_t kPackedRows = 32;  // of a matrix in one packed block

// The type of a model's weights.
struct WeightType {
  torch::ScalarType dtype;  // of activations, and of whatever is not quantised
  Packing packing;

  // "float32", "bfloat16", "float16", "int8", "fp8" or "int4"
  std::string name() const;
};

// From a name as above, or "auto": the checkpoint's. Float weights are packed on the CPU if `pack` is true and their
// sizes allow it. Throws std::invalid_argument for another name; for a quantised type with sizes that are no
// multiples of 32; and for a checkpoint that is quantised already, unless the name is its own.
WeightType parse_weight_type(const std::string& name, const Config& config, torch::Device device, bool pack = true);

// The first size that keeps the matrices from being packed, in words; empty when there is none.
std::string unfit_size(const Config& config);

// Whether it is one of the quantised formats.
bool is_quantized(Packing packing);
// Bytes of all weights, to within 1 %.
double weight_bytes(const Config& config, const WeightType& type);
// Bytes of one value of a matrix.
double bytes_per_weight(const WeightType& type);

// A parameter: plain of `shape` ([rows, cols] or [experts, rows, cols]), or packed.
torch::Tensor empty_matrix(const std::vector<int64_t>& shape, const torch::TensorOptions& options, Packing packing);
// rows [n, cols], n a multiple of 32 -> [n/32, ...]: the blocks of a packed parameter that they become.
torch::Tensor pack_rows(const torch::Tensor& rows, Packing packing);
// Whether a parameter is a packed matrix.
bool is_packed(const torch::Tensor& parameter);
// Whether lm_head is.
bool packs_lm_head(const Config& config, Packing packing);

}  // namespace mixtral
