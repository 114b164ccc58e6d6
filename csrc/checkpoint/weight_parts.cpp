#include "weight_parts.h"

#include <algorithm>
#include <stdexcept>

namespace mixtral {
namespace {

// A tensor of packed blocks is a whole parameter. Blocks in four dimensions are steps of some columns, one after the
// other; those of int8 and fp8, in three, end with the scales of whole rows.
WeightPart blocks_of(const WeightSlice& slice, const Parameter& parameter, const ParameterShard& shard,
                     WeightPart part) {
  const int64_t cols = parameter.shape.back();
  part.row_size = slice.rows() * slice.cols() / (parameter.size() / cols / kPackedRows);
  for (int64_t* row : {&part.first_row, &part.rows, &part.own_row}) *row /= kPackedRows;
  if (shard.columns == cols) {
    part.columns = part.row_size;
    return part;
  }
  if (slice.shape.size() != 4) {
    throw std::invalid_argument(
        "without expert parallelism columns of " + parameter.name +
        " are cut, which int8 and fp8 cannot be once they are quantised: use expert parallelism, int4, or the "
        "checkpoint that is not quantised");
  }
  part.first_column = part.row_size / (cols / kPackedRows) * (shard.first_column / kPackedRows);
  part.columns = part.row_size / (cols / kPackedRows) * (shard.columns / kPackedRows);
  return part;
}

}  // namespace

std::vector<WeightPart> parts_of(const WeightSlice& slice, const Parameter& parameter, const ParameterShard& shard) {
  const int64_t slice_rows = slice.packed       ? parameter.size() / parameter.shape.back()
                             : slice.transposed ? slice.cols()
                                                : slice.rows();
  std::vector<WeightPart> parts;
  int64_t own_row = 0;
  for (const RowRange& range : shard.rows) {
    const int64_t begin = std::max(range.begin, slice.first_row);
    const int64_t rows = std::min(range.end, slice.first_row + slice_rows) - begin;
    if (rows > 0) {
      WeightPart part;
      part.first_row = begin - slice.first_row;
      part.rows = rows;
      part.first_column = shard.first_column;
      part.columns = shard.columns;
      part.row_size = slice.cols();
      part.own_row = own_row + begin - range.begin;
      part.parameter_row = begin;
      part.parameter_column = shard.first_column;
      if (slice.transposed) {  // rows of the tensor are columns of the parameter
        std::swap(part.first_row, part.first_column);
        std::swap(part.rows, part.columns);
      }
      part.first_row += slice.first_tensor_row;
      parts.push_back(slice.packed ? blocks_of(slice, parameter, shard, part) : part);
    }
    own_row += range.end - range.begin;
  }
  return parts;
}

}  // namespace mixtral
