// Where values lie on Hopper: shared memory as TMA swizzles it and wgmma reads it, and the fragments of an accumulator.
// Host and device share these functions; GoogleTests prove on the CPU what the kernels compute with them.
//
// Sources: PTX ISA 8.x, "Tensor Swizzling Modes", "Shared Memory Matrix Layout" and "Matrix Descriptor Format" of
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace mixtral::cuda {

// Tiles in shared memory are rows of 128 bytes, in atoms of 8 rows (1024 bytes, so aligned). The 128-byte swizzle
// permutes the 16-byte chunks of a row by the number of the row in its atom.
inline constexpr int kSwizzleRowBytes = 128, kSwizzleAtomBytes = 1024;

// Byte offset in an aligned tile -> where the swizzle puts it.
MIXTRAL_HOST_DEVICE constexpr uint32_t swizzle_128b(uint32_t offset) { return offset ^ (offset >> 3 & 0x70); }

// A wgmma matrix descriptor for a tile with the 128-byte swizzle; `address` is that of shared memory, strides in bytes.
// Depth contiguous (K-major): stride = distance of groups of 8 rows; leading is not used.
// Rows contiguous (MN-major): leading = distance of chunks of 64 16-bit rows, stride = distance of groups of 8 depths.
MIXTRAL_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t stride = kSwizzleAtomBytes,
                                                         uint32_t leading = 16) {
  constexpr uint64_t kSwizzle128 = 1;
  return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | kSwizzle128 << 62;
}

// The accumulator of a warpgroup's m64nN product: thread t (of 128) holds N / 2 values; value i is at
MIXTRAL_HOST_DEVICE constexpr int accumulator_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
MIXTRAL_HOST_DEVICE constexpr int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// A place in a ring of `stages` buffers, and the parity of the barriers there. It is carried across tiles.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  MIXTRAL_HOST_DEVICE constexpr void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace mixtral::cuda
