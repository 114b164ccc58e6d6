#include "packing.h"

#include <optional>
#include <stdexcept>

#include "memory.h"
#include "ops.h"

namespace mixtral {
namespace {

constexpr std::pair<const char*, Packing> kQuantized[] = {
    {"int8", Packing::kInt8}, {"fp8", Packing::kFp8}, {"int4", Packing::kInt4}};

std::optional<std::string> quantize_name(Packing packing) {
  for (const auto& [name, quantized] : kQuantized)
    if (packing == quantized) return name;
  return std::nullopt;
}

}  // namespace

bool is_quantized(Packing packing) { return quantize_name(packing).has_value(); }

std::string WeightType::name() const {
  if (const auto quantized = quantize_name(packing)) return *quantized;
  return dtype == torch::kFloat32 ? "float32" : dtype == torch::kFloat16 ? "float16" : "bfloat16";
}

std::string unfit_size(const Config& config) {
  const std::pair<const char*, int64_t> sizes[] = {{"hidden_size", config.hidden_size},
                                                   {"intermediate_size", config.intermediate_size},
                                                   {"num_heads * head_dim", config.num_heads * config.head_dim},
                                                   {"num_kv_heads * head_dim", config.num_kv_heads * config.head_dim}};
  for (const auto& [name, size] : sizes)
    if (size % kPackedRows != 0) return std::string(name) + " " + std::to_string(size);
  return "";
}

WeightType parse_weight_type(const std::string& name, const Config& config, torch::Device device, bool pack) {
  const std::string stored = config.quantization.empty() ? config.dtype : config.quantization;
  const std::string chosen = name == "auto" ? stored : name;
  if (!config.quantization.empty() && chosen != stored) {
    throw std::invalid_argument("dtype must be auto or " + stored + " for a checkpoint quantised to " + stored +
                                ", got " + name);
  }
  const std::string unfit = unfit_size(config);
  for (const auto& [quantized, packing] : kQuantized) {
    if (chosen != quantized) continue;
    if (!unfit.empty())
      throw std::invalid_argument("dtype " + chosen + " needs sizes that are multiples of 32, got " + unfit);
    return {torch::kBFloat16, packing};
  }
  const Packing packing = pack && device.is_cpu() && unfit.empty() ? Packing::kFloat : Packing::kNone;
  if (chosen == "float32") return {torch::kFloat32, packing};
  if (chosen == "float16") return {torch::kFloat16, packing};
  if (chosen == "bfloat16") return {torch::kBFloat16, packing};
  throw std::invalid_argument("dtype must be auto, float32, bfloat16, float16, int8, fp8 or int4, got " + name);
}

double bytes_per_weight(const WeightType& type) {
  if (type.packing == Packing::kInt8 || type.packing == Packing::kFp8) return 1;
  if (type.packing == Packing::kInt4) return 0.5 + 1.0 / kPackedRows;  // a byte of scale for each 32
  return static_cast<double>(c10::elementSize(type.dtype));
}

double weight_bytes(const Config& config, const WeightType& type) {
  const bool plain_head = !config.tie_word_embeddings && !packs_lm_head(config, type.packing);
  const auto plain = static_cast<double>((plain_head ? 2 : 1) * config.vocab_size * config.hidden_size);
  const double others = static_cast<double>(config.total_parameters()) - plain;
  return plain * static_cast<double>(c10::elementSize(type.dtype)) + others * bytes_per_weight(type);
}

torch::Tensor empty_matrix(const std::vector<int64_t>& shape, const torch::TensorOptions& options, Packing packing) {
  if (packing == Packing::kNone) return torch::empty(shape, options);
  const size_t rank = shape.size();
  // What the op makes of no expert at all has the shape of one.
  const auto none = torch::empty({0, shape[rank - 2], shape[rank - 1]}, options.device(torch::kCPU));
  const auto packed = ops::pack_weight(none, quantize_name(packing));
  auto packed_shape = packed.sizes().vec();
  packed_shape[0] = rank == 3 ? shape[0] : 1;
  auto matrix = torch::empty(packed_shape, options.dtype(packed.dtype()));
  if (matrix.is_cpu()) advise_huge_pages(matrix.mutable_data_ptr(), matrix.nbytes());
  return matrix;
}

torch::Tensor pack_rows(const torch::Tensor& rows, Packing packing) {
  return ops::pack_weight(rows.unsqueeze(0), quantize_name(packing)).squeeze(0);
}

bool is_packed(const torch::Tensor& parameter) { return parameter.dim() == 4 || parameter.element_size() == 1; }

bool packs_lm_head(const Config& config, Packing packing) {
  return packing != Packing::kNone && !config.tie_word_embeddings && config.vocab_size % kPackedRows == 0;
}

}  // namespace mixtral
