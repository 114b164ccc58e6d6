// Steps of a quantised block (pack_weight.h) as bf16 panels in pair order.
#pragma once

#include "pack_weight.h"

namespace mixtral {

// bf16 of n - 15/2 for n = 0 to 15, then of the same times the square root of two.
inline constexpr uint16_t kInt4Levels[2 * 16] = {0xc0f0, 0xc0d0, 0xc0b0, 0xc090, 0xc060, 0xc020, 0xbfc0, 0xbf00,
                                                 0x3f00, 0x3fc0, 0x4020, 0x4060, 0x4090, 0x40b0, 0x40d0, 0x40f0,
                                                 0xc12a, 0xc113, 0xc0f9, 0xc0cc, 0xc09e, 0xc062, 0xc008, 0xbf35,
                                                 0x3f35, 0x4008, 0x4062, 0x409e, 0x40cc, 0x40f9, 0x4113, 0x412a};

// Steps from depth k on of a block, whose rows are `depth` long -> out [steps, 1024]: the values of int4 and fp8, and
// of int8 q * kInt8Unit.
void dequantize_int8(const char* block, int64_t k, int64_t steps, BFloat16* out);
void dequantize_fp8(const char* block, int64_t depth, int64_t k, int64_t steps, BFloat16* out);
void dequantize_int4(const char* block, int64_t k, int64_t steps, BFloat16* out);

}  // namespace mixtral
