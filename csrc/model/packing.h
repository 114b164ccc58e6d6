// Parameters as tensors: plain, or packed in the format of csrc/ops/pack_weight/pack_weight.h, which the CPU kernels
// read faster and which may be quantised.
#pragma once

#include <map>
#include <string>

#include "libtorch.h"
#include "parameters.h"
#include "weight_type.h"

namespace mixtral {

// "bfloat16" <-> torch::kBFloat16
torch::ScalarType scalar_type(const std::string& dtype);
std::string dtype_name(torch::ScalarType type);

// A parameter of a model of type `dtype` and `packing`, or a rank's part of one, not initialised.
torch::Tensor empty_parameter(const Parameter& parameter, torch::ScalarType dtype, torch::Device device,
                              Packing packing);
// rows [n, cols], n a multiple of 32 -> [n/32, ...]: the blocks of a packed parameter that they become.
torch::Tensor pack_rows(const torch::Tensor& rows, Packing packing);
// The scales that packing to int4 gives the rows [n, kScaleGroup] of one group of depths: uint8 [n], as
// ops::pack_weight takes them back.
torch::Tensor int4_scales(const torch::Tensor& rows);
// Whether a parameter is a packed matrix.
bool is_packed(const torch::Tensor& parameter);

// Parameters by their names in model/parameters.h.
using ParameterMap = std::map<std::string, torch::Tensor>;

// Allocates what one rank holds of the parameters of a model, and registers it in the model's modules.
class ParameterAllocator {
 public:
  // given: parameters that exist already, in the shapes of empty_parameter, such as views of a mapped file. Throws
  // std::invalid_argument when the model cannot be cut as `placement` says, or its parts cannot be packed.
  ParameterAllocator(const Config& config, torch::ScalarType dtype, torch::Device device, Packing packing,
                     const Placement& placement = {}, const ParameterMap& given = {});
  // The parameter `path` + `name` of model/parameters.h, registered in `module` as `name`. Throws std::out_of_range for
  // one of which the rank holds no part.
  torch::Tensor add(torch::nn::Module& module, const std::string& path, const std::string& name) const;

 private:
  std::map<std::string, Parameter> parameters_;  // with the shapes of the rank
  torch::ScalarType dtype_;
  torch::Device device_;
  Packing packing_;
  const ParameterMap given_;
};

}  // namespace mixtral
