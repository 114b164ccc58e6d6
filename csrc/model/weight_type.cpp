#include "weight_type.h"

#include <stdexcept>
#include <tuple>
#include <utility>

#include "parameters.h"

namespace mixtral {
namespace {

constexpr std::pair<const char*, Packing> kQuantized[] = {
    {"int8", Packing::kInt8}, {"fp8", Packing::kFp8}, {"int4", Packing::kInt4}};

bool is_float_type(const std::string& name) { return name == "float32" || name == "bfloat16" || name == "float16"; }

}  // namespace

bool is_quantized(Packing packing) { return packing != Packing::kNone && packing != Packing::kFloat; }

std::string WeightType::name() const {
  for (const auto& [name, quantized] : kQuantized)
    if (packing == quantized) return name;
  return dtype;
}

int64_t WeightType::element_size() const { return dtype == "float32" ? 4 : 2; }

std::string unfit_size(const Config& config, const Placement& placement) {
  const int64_t D = config.head_dim;
  const std::tuple<const char*, int64_t, int64_t> sizes[] = {
      {"hidden_size", config.hidden_size, config.hidden_size / placement.tensor_size},  // rows of o_proj
      {"intermediate_size", config.intermediate_size, placement.intermediate_size(config)},
      {"num_heads * head_dim", config.num_heads * D, placement.num_heads(config) * D},
      {"num_kv_heads * head_dim", config.num_kv_heads * D, placement.num_kv_heads(config) * D}};
  for (const auto& [name, whole, own] : sizes) {
    if (own % kPackedRows == 0) continue;
    const std::string over = own == whole ? "" : " over " + std::to_string(placement.tensor_size) + " ranks";
    return std::string(name) + " " + std::to_string(whole) + over;
  }
  return "";
}

WeightType parse_weight_type(const std::string& name, const Config& config, const std::string& device, bool pack,
                             const Placement& placement) {
  const std::string stored = config.quantization.empty() ? config.dtype : config.quantization;
  const std::string chosen = name == "auto" ? stored : name;
  if (!config.quantization.empty() && chosen != stored) {
    throw std::invalid_argument("dtype must be auto or " + stored + " for a checkpoint " +
                                (is_float_type(stored) ? "packed as " : "quantised to ") + stored + ", got " + name);
  }
  const std::string unfit = unfit_size(config, placement);
  for (const auto& [quantized, packing] : kQuantized) {
    if (chosen != quantized) continue;
    if (!unfit.empty())
      throw std::invalid_argument("dtype " + chosen + " needs sizes that are multiples of 32, got " + unfit);
    return {"bfloat16", packing};
  }
  if (!is_float_type(chosen))
    throw std::invalid_argument("dtype must be auto, float32, bfloat16, float16, int8, fp8 or int4, got " + name);
  if (!config.quantization.empty()) {
    if (device == "cpu") return {chosen, Packing::kFloat};
    throw std::invalid_argument("a checkpoint packed as " + stored + " is for device cpu, got " + device +
                                ": take the one that it was made from");
  }
  return {chosen, pack && device == "cpu" && unfit.empty() ? Packing::kFloat : Packing::kNone};
}

double bytes_per_weight(const WeightType& type) {
  switch (type.packing) {
    case Packing::kInt8:
    case Packing::kFp8:
      return 1;
    case Packing::kInt4:
      return 0.5 + 1.0 / kScaleGroup;
    default:
      return static_cast<double>(type.element_size());
  }
}

double parameter_bytes(const Parameter& parameter, const WeightType& type) {
  const bool packed = parameter.packing(type.packing) != Packing::kNone;
  const auto plain = static_cast<double>(parameter.is_f32 ? 4 : type.element_size());
  return static_cast<double>(parameter.size()) * (packed ? bytes_per_weight(type) : plain);
}

double weight_bytes(const Config& config, const WeightType& type, const Placement& placement) {
  double bytes = 0;
  for (Parameter& parameter : placed_parameters(config, placement)) {
    parameter.shape = shard_of(parameter, config, placement).shape;
    bytes += parameter_bytes(parameter, type);
  }
  return bytes;
}

}  // namespace mixtral
