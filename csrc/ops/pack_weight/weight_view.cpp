#include "weight_view.h"

#include "../tensors.h"

namespace mixtral {

WeightFormat weight_format(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Char:
      return WeightFormat::kInt8;
    case ScalarType::Float8_e4m3fn:
      return WeightFormat::kFp8;
    case ScalarType::Byte:
      return WeightFormat::kInt4;
    default:
      return weight.dim() == 4 ? WeightFormat::kPacked : WeightFormat::kPlain;
  }
}

namespace {

// The shape of a packed weight -> Kdim; -1 if no weight has it.
int64_t packed_depth(const Tensor& weight, WeightFormat format) {
  const int64_t last = weight.size(weight.dim() - 1);
  const int64_t depth = has_row_scales(format) ? (last - kRowScaleBytes) / kBlockRows : weight.size(2) * kStepDepth;
  return depth >= 0 && depth % kStepDepth == 0 && last == packed_last_size(format, depth) ? depth : -1;
}

}  // namespace

Weight as_weight(const char* op, const char* name, const Tensor& weight, ScalarType input, const char* symbols) {
  const WeightFormat format = weight_format(weight);
  const bool plain = format == WeightFormat::kPlain;
  check_rank(op, name, weight, plain || has_row_scales(format) ? 3 : 4, plain ? symbols : "of a packed weight");
  const int64_t depth = plain ? weight.size(2) : packed_depth(weight, format);
  MIXTRAL_CHECK(depth >= 0, op, ": ", name, " must have the shape of a packed weight, got ", shape_string(weight));
  if (!is_quantized(format)) check_dtype(op, name, weight, input);
  MIXTRAL_CHECK(!is_quantized(format) || input == ScalarType::BFloat16, op, ": ", name,
                " is quantised and needs inputs of BFloat16, got ", torch::headeronly::toString(input));
  const Tensor tensor = as_contiguous(weight);
  const int64_t columns = plain ? weight.size(1) : weight.size(1) * kBlockRows;
  return {tensor, {format, tensor.const_data_ptr(), weight.size(0), columns, depth}};
}

void check_weight_shape(const char* op, const char* name, const Weight& weight, int64_t columns, int64_t depth) {
  const WeightView& view = weight.view;
  if (view.format == WeightFormat::kPlain) {
    check_size(op, name, weight.tensor, 1, columns);
    check_size(op, name, weight.tensor, 2, depth);
  }
  MIXTRAL_CHECK(view.columns == columns && view.depth == depth, op, ": ", name, " must be packed from [", view.experts,
                ", ", columns, ", ", depth, "], got [", view.experts, ", ", view.columns, ", ", view.depth, "]");
}

}  // namespace mixtral
