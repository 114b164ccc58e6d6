// What a nibble and a scale byte stand for, in the words of pack_weight.h.
#pragma once

#include <cmath>

#include "ops/grouped_gemm/int4_tile.h"

namespace mixtral {

inline float int4_value(const Int4Value& value) {
  const float level = (static_cast<float>(value.nibble) - 7.5f) * (value.scale % 2 ? 1.41421356f : 1.0f);
  return std::ldexp(static_cast<float>(BFloat16(level)), value.scale / 2 - 64);
}

}  // namespace mixtral
