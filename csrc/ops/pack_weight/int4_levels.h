// The levels of int4 weights (pack_weight.h) as bits of bf16, for look-ups.
#pragma once

#include <cstdint>

namespace mixtral {

// n - 15/2 for n = 0 to 15, then the same times the square root of two.
inline constexpr uint16_t kInt4Levels[2 * 16] = {0xc0f0, 0xc0d0, 0xc0b0, 0xc090, 0xc060, 0xc020, 0xbfc0, 0xbf00,
                                                 0x3f00, 0x3fc0, 0x4020, 0x4060, 0x4090, 0x40b0, 0x40d0, 0x40f0,
                                                 0xc12a, 0xc113, 0xc0f9, 0xc0cc, 0xc09e, 0xc062, 0xc008, 0xbf35,
                                                 0x3f35, 0x4008, 0x4062, 0x409e, 0x40cc, 0x40f9, 0x4113, 0x412a};

}  // namespace mixtral
