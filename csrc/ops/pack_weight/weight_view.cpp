#include "weight_view.h"

namespace mixtral {

WeightView view_weight(const char* op, const char* name, const Tensor& weight, ScalarType input, const char* symbols) {
  const void* data = weight.const_data_ptr();
  const ScalarType type = weight.scalar_type();
  const bool int8 = type == ScalarType::Char, int4 = type == ScalarType::Byte;
  const int64_t rank = weight.dim(), last = rank > 0 ? weight.size(rank - 1) : 0;
  const bool packed = int8 || int4 || rank == 4;
  if (packed) {
    check_rank(op, name, weight, int8 ? 3 : 4, "of a packed weight");
    const bool fits = int8 ? last >= 128 && last % 1024 == 128 : last == (int4 ? kInt4StepBytes : 1024);
    MIXTRAL_CHECK(fits, op, ": ", name, " must have the shape of a packed weight, got ", shape_string(weight));
  } else {
    check_rank(op, name, weight, 3, symbols);
  }
  check_dtype(op, name, weight, packed && (int8 || int4) ? type : input);
  MIXTRAL_CHECK(!(int8 || int4) || input == ScalarType::BFloat16, op, ": ", name,
                " is quantised and must meet inputs of BFloat16, got ", torch::headeronly::toString(input));
  if (!packed) return {WeightFormat::kPlain, data, weight.size(0), weight.size(1), weight.size(2)};
  const int64_t columns = weight.size(1) * kBlockRows;
  if (int8) return {WeightFormat::kInt8, data, weight.size(0), columns, (last - 128) / kBlockRows};
  return {int4 ? WeightFormat::kInt4 : WeightFormat::kPacked, data, weight.size(0), columns, weight.size(2) * 32};
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
