// What a rank reads of a checkpoint's tensors: rectangles, so that nothing else is read.
#pragma once

#include <cstdint>
#include <vector>

#include "../model/parameters.h"
#include "../model/placement.h"
#include "weight_names.h"

namespace mixtral {

// Rows and columns of a tensor seen as [all rows, row_size]; a tensor of packed blocks has a block in each row.
struct WeightPart {
  int64_t first_row, rows;
  int64_t first_column, columns;
  int64_t row_size;
  // Where it goes: the first row of the rank's parameter, and the first row and column of the whole one.
  int64_t own_row, parameter_row, parameter_column;
};

// The parts of `slice` that a rank reads which holds `shard` of `parameter`; none: it holds other rows. Throws
// std::invalid_argument for columns of blocks that cannot be cut into columns.
std::vector<WeightPart> parts_of(const WeightSlice& slice, const Parameter& parameter, const ParameterShard& shard);

}  // namespace mixtral
