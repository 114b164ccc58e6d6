#include "weight_view.h"

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

WeightView view_weight(const char* op, const char* name, const Tensor& weight, ScalarType input, const char* symbols) {
  const void* data = weight.const_data_ptr();
  const WeightFormat format = weight_format(weight);
  const bool row_scales = format == WeightFormat::kInt8 || format == WeightFormat::kFp8;
  const int64_t rank = weight.dim(), last = rank > 0 ? weight.size(rank - 1) : 0;
  if (format == WeightFormat::kPlain) {
    check_rank(op, name, weight, 3, symbols);
  } else {
    check_rank(op, name, weight, row_scales ? 3 : 4, "of a packed weight");
    const bool fits = row_scales ? last >= 128 && last % 1024 == 128
                                 : last == (format == WeightFormat::kInt4 ? kInt4StepBytes : 1024);
    MIXTRAL_CHECK(fits, op, ": ", name, " must have the shape of a packed weight, got ", shape_string(weight));
  }
  if (!is_quantized(format)) check_dtype(op, name, weight, input);
  MIXTRAL_CHECK(!is_quantized(format) || input == ScalarType::BFloat16, op, ": ", name,
                " is quantised and must meet inputs of BFloat16, got ", torch::headeronly::toString(input));
  if (format == WeightFormat::kPlain) return {format, data, weight.size(0), weight.size(1), weight.size(2)};
  const int64_t depth = row_scales ? (last - 128) / kBlockRows : weight.size(2) * 32;
  return {format, data, weight.size(0), weight.size(1) * kBlockRows, depth};
}

void check_weight_shape(const char* op, const char* name, const Tensor& weight, const WeightView& view, int64_t columns,
                        int64_t depth) {
  if (view.format == WeightFormat::kPlain) {
    check_size(op, name, weight, 1, columns);
    check_size(op, name, weight, 2, depth);
  }
  MIXTRAL_CHECK(view.columns == columns && view.depth == depth, op, ": ", name, " must be packed from [", view.experts,
                ", ", columns, ", ", depth, "], got [", view.experts, ", ", view.columns, ", ", view.depth, "]");
}

}  // namespace mixtral
