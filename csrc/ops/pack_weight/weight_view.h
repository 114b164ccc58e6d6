// A weight argument of an op, plain [E, N, Kdim] or packed: the shape and dtype tell which.
#pragma once

#include "../checks.h"
#include "pack_weight.h"

namespace mixtral {

// The format that dtype and rank mean.
WeightFormat weight_format(const Tensor& weight);

// `weight` must outlive the view; its data is used only if it is contiguous. Throws when it is neither plain nor in one
// of the packed formats, or does not go with inputs of type `input`: the same dtype, or BFloat16 when quantised.
// `symbols` names the dimensions of a plain one, e.g. "[E, N, Kdim]".
WeightView view_weight(const char* op, const char* name, const Tensor& weight, ScalarType input, const char* symbols);

// Throws unless `weight` stands for [E, columns, depth].
void check_weight_shape(const char* op, const char* name, const Tensor& weight, const WeightView& view, int64_t columns,
                        int64_t depth);

}  // namespace mixtral
