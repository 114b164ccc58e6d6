#include "packing.h"

#include <optional>
#include <stdexcept>

#include "ops.h"

namespace mixtral {
namespace {

// The argument `quantize` of the op pack_weight.
std::optional<std::string> quantize_argument(Packing packing) {
  if (!is_quantized(packing)) return std::nullopt;
  return WeightType{"bfloat16", packing}.name();
}

}  // namespace

torch::ScalarType scalar_type(const std::string& dtype) {
  if (dtype == "float32") return torch::kFloat32;
  if (dtype == "float16") return torch::kFloat16;
  if (dtype == "bfloat16") return torch::kBFloat16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + dtype);
}

std::string dtype_name(torch::ScalarType type) {
  return type == torch::kFloat32 ? "float32" : type == torch::kFloat16 ? "float16" : "bfloat16";
}

torch::Tensor empty_parameter(const Parameter& parameter, torch::ScalarType dtype, torch::Device device,
                              Packing packing) {
  const auto& shape = parameter.shape;
  const auto options = torch::dtype(parameter.is_f32 ? torch::kFloat32 : dtype).device(device);
  if (parameter.packing(packing) == Packing::kNone) return torch::empty(shape, options);
  // Packing zero experts costs nothing and shows the shape and dtype of one expert's blocks.
  const size_t rank = shape.size();
  const auto none = torch::empty({0, shape[rank - 2], shape[rank - 1]}, options.device(torch::kCPU));
  const auto packed = ops::pack_weight(none, quantize_argument(packing));
  auto packed_shape = packed.sizes().vec();
  packed_shape[0] = rank == 3 ? shape[0] : 1;
  return torch::empty(packed_shape, options.dtype(packed.dtype()));
}

torch::Tensor pack_rows(const torch::Tensor& rows, Packing packing) {
  return ops::pack_weight(rows.unsqueeze(0), quantize_argument(packing)).squeeze(0);
}

torch::Tensor int4_scales(const torch::Tensor& rows) {
  // One group of depths is one step, which begins with the scales of its rows (ops/pack_weight/pack_weight.h).
  return ops::pack_weight(rows.unsqueeze(0), "int4").narrow(3, 0, kPackedRows).flatten();
}

bool is_packed(const torch::Tensor& parameter) { return parameter.dim() == 4 || parameter.element_size() == 1; }

ParameterAllocator::ParameterAllocator(const Config& config, torch::ScalarType dtype, torch::Device device,
                                       Packing packing, const Placement& placement, const ParameterMap& given)
    : dtype_(dtype), device_(device), packing_(packing), given_(given) {
  placement.check(config);
  const std::string unfit = unfit_size(config, placement);
  if (packing != Packing::kNone && !placement.is_whole() && !unfit.empty())
    throw std::invalid_argument("packed weights need sizes that are multiples of 32 on every rank, got " + unfit);
  for (Parameter& parameter : placed_parameters(config, placement)) {
    parameter.shape = shard_of(parameter, config, placement).shape;
    parameters_.emplace(parameter.name, std::move(parameter));
  }
}

torch::Tensor ParameterAllocator::add(torch::nn::Module& module, const std::string& path,
                                      const std::string& name) const {
  const auto given = given_.find(path + name);
  const auto tensor =
      given != given_.end() ? given->second : empty_parameter(parameters_.at(path + name), dtype_, device_, packing_);
  return module.register_parameter(name, tensor, /*requires_grad=*/false);
}

}  // namespace mixtral
