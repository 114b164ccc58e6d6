// The type of a model's weights: their precision, and whether the matrices are packed (csrc/ops/pack_weight/
// pack_weight.h) or quantised. model/parameters.h says which parameters can be packed.
#pragma once

#include <cstdint>
#include <string>

#include "config.h"
#include "placement.h"

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

// From a name as above, or "auto": the checkpoint's. Float weights are packed on the CPU if `pack` is true and the
// sizes of every rank allow it. Throws std::invalid_argument for another name; for a quantised type with sizes that are
// no multiples of 32; for a checkpoint that is packed already, unless the name is its own; and for one that is packed
// and not quantised, on another device than the CPU.
WeightType parse_weight_type(const std::string& name, const Config& config, const std::string& device = "cpu",
                             bool pack = true, const Placement& placement = {});

// The first size that keeps the matrices of a rank from being packed, in words; empty when there is none: "hidden_size
// 96 over 2 ranks".
std::string unfit_size(const Config& config, const Placement& placement = {});

// Bytes of one value of a packed matrix, scales included where there are many.
double bytes_per_weight(const WeightType& type);
// Bytes of a parameter, or of a rank's part of one, to within 1 %.
double parameter_bytes(const Parameter& parameter, const WeightType& type);
// Bytes of the weights of one rank, to within 1 %.
double weight_bytes(const Config& config, const WeightType& type, const Placement& placement = {});

}  // namespace mixtral
