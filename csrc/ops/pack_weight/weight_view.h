// A weight argument of an op, plain [E, N, Kdim] or packed: its dtype and rank tell which.
#pragma once

#include "../checks.h"
#include "pack_weight.h"

namespace mixtral {

struct Weight {
  Tensor tensor;  // contiguous; owns the data of `view`
  WeightView view;
};

WeightFormat weight_format(const Tensor& weight);

// Throws if `weight` is neither plain nor in a packed format, or does not fit inputs of type `input`: a weight has the
// same dtype, or is quantised and the inputs are BFloat16. `symbols` names the dimensions of a plain one, e.g.
// "[E, N, Kdim]".
Weight as_weight(const char* op, const char* name, const Tensor& weight, ScalarType input, const char* symbols);

// Throws unless the weight, unpacked, is [E, columns, depth].
void check_weight_shape(const char* op, const char* name, const Weight& weight, int64_t columns, int64_t depth);

}  // namespace mixtral
