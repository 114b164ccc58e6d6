// Steps of a quantised block (pack_weight.h) as bf16 panels in pair order.
#pragma once

#include "pack_weight.h"

namespace mixtral {

// Steps from depth k on of a block whose rows are `depth` long -> out [steps, 1024].
void dequantize_int8(const char* block, int64_t depth, int64_t k, int64_t steps, BFloat16* out);
void dequantize_int4(const char* block, int64_t k, int64_t steps, BFloat16* out);

}  // namespace mixtral
