// The type of a model's weights: their precision, and whether the matrices are packed (csrc/ops/pack_weight/
// pack_weight.h) or quantised. model/parameters.h says which parameters can be packed.
#pragma once

#include <cstdint>
#include <string>

#include "config.h"

namespace mixtral {

enum class Packing { kNone, kFloat, kInt8, kFp8, kInt4 };

// Whether it is one of the quantised formats.
bool is_quantized(Packing packing);

struct WeightType {
  std::string dtype;  // of activations and of every parameter that is not quantised: "float32", "bfloat16" or "float16"
  Packing packing = Packing::kNone;

  // "float32", "bfloat16", "float16", "int8", "fp8" or "int4"
  std::string name() const;
  int64_t element_size() const;  // bytes of an activation
};

// From a name as above, or "auto": the checkpoint's. Float weights are packed on the CPU if `pack` is true and their
// sizes allow it. Throws std::invalid_argument for another name; for a quantised type with sizes that are no
// multiples of 32; for a checkpoint that is packed already, unless the name is its own; and for one that is packed and
// not quantised, on another device than the CPU.
WeightType parse_weight_type(const std::string& name, const Config& config, const std::string& device = "cpu",
                             bool pack = true);

// The first size that keeps the matrices from being packed, in words; empty when there is none.
std::string unfit_size(const Config& config);

// Bytes of one value of a packed matrix, scales included where there are many.
double bytes_per_weight(const WeightType& type);
// Bytes of all weights, to within 1 %.
double weight_bytes(const Config& config, const WeightType& type);

}  // namespace mixtral
