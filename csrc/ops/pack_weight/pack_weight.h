// pack_weight: the rows of weights [E, N, Kdim], which are the columns of a product, in the order in which the CPU
// kernels read them, optionally quantised; unpack_weight: back to rows. CUDA kernels take the same bytes.
//
// A block holds 32 rows. Along the depth it is cut into steps of 32, in the order of cpu/matmul.h. N and Kdim are
// multiples of 32, so that the shape of a packed weight tells them.
//
//   quantize  packed                          one block
//   none      float [E, N/32, Kdim/32, 1024]  steps; bf16 in pair order
//   int8      Char  [E, N/32, 32*Kdim + 128]  steps of 1024 values in pair order; then a f32 scale for each row
//   fp8       Float8_e4m3fn, likewise         rows of Kdim e4m3 values; then a f32 scale for each row
//   int4      Byte  [E, N/32, Kdim/32, 544]   steps: a byte of scale for each row, then 2 halves of 256 bytes
//
// int8: a weight is scale * q, q in [-127, 127], one scale a row, which is never zero or subnormal. The CPU kernels
// multiply by q, which bf16 holds exactly, and each finished sum by its scale; unpacked, a weight is rounded to bf16.
//
// fp8: a weight is scale * e4m3, exact in bf16, one scale a row, a power of two (e4m3.h). Rows that meet such a weight
// in a product are first rounded in the same way.
//
// int4: a weight is a bf16 value, one of sixteen levels without a zero, s * (q + 1/2), q in [-8, 7], one scale s for
// each 32 depths of a row. s is a power of the square root of two: a level at any scale is then one of 32 bf16 values
// with another exponent, which a table look-up finds. Scale byte e means
//   value = bf16((q + 1/2) * (e odd ? sqrt(2) : 1)) * 2^(e div 2 - 64).
// Half h of an int4 step holds rows 16 h to 16 h + 15 as four groups of 32 16-bit words: nibble i of word w in group g
// is q + 8 of pair 4 g + i, row 16 h + w div 2, at the pair's depth w mod 2.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "../cuda/stream.h"
#include "../host_device.h"
#include "../product_order.h"

namespace mixtral {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

enum class WeightFormat { kPlain, kPacked, kInt8, kFp8, kInt4 };

inline constexpr int64_t kBlockRows = 32, kInt4StepBytes = 544;
inline constexpr float kInt8Unit = 65536;  // what panels of int8 weights are multiples of: the cheapest to make from q

inline bool is_quantized(WeightFormat format) {
  return format != WeightFormat::kPlain && format != WeightFormat::kPacked;
}

// Weights of a grouped product in any format; `data` is contiguous.
struct WeightView {
  WeightFormat format;
  const void* data;
  int64_t experts, columns, depth;  // E, N, Kdim
};

// Bytes of one packed block, for values of `element_size` bytes.
MIXTRAL_HOST_DEVICE inline int64_t packed_block_bytes(WeightFormat format, int64_t depth, int64_t element_size) {
  switch (format) {
    case WeightFormat::kInt8:
    case WeightFormat::kFp8:
      return kBlockRows * (depth + static_cast<int64_t>(sizeof(float)));
    case WeightFormat::kInt4:
      return depth / 32 * kInt4StepBytes;
    default:
      return kBlockRows * depth * element_size;
  }
}

// The packed block of columns [column, column + 32) of bf16 or quantised weights; column is a multiple of 32.
inline const char* packed_block(const WeightView& weight, int64_t expert, int64_t column) {
  return static_cast<const char*>(weight.data) + (expert * weight.columns + column) / kBlockRows *
                                                     packed_block_bytes(weight.format, weight.depth, sizeof(BFloat16));
}

// Blocks [begin, end) of all experts' blocks: weight [E*N, Kdim] -> out. scales [E*N, Kdim/32] of int4; null: those of
// least squared error. False where quantising meets 2^66, inf or NaN.
template <typename T>
bool launch_pack_weight_cpu(const T* weight, const uint8_t* scales, WeightFormat format, int64_t depth, char* out,
                            int64_t begin, int64_t end);

// The inverse: packed -> out [E*N, Kdim]. T is BFloat16 for the quantised formats.
template <typename T>
void launch_unpack_weight_cpu(const char* packed, WeightFormat format, int64_t depth, T* out, int64_t begin,
                              int64_t end);

// The same on CUDA, for a weight that is not plain; returns a cudaError_t. out is aligned to 32 bytes.
template <typename T>
int launch_unpack_weight_cuda(const WeightView& weight, T* out, cudaStream_t stream);

// The panel (cpu/matmul.h) of columns [column, column + 32) of `expert` at depths [k, k + depth), zero where there are
// none; column and k are multiples of 32. It is the weight itself where its format allows, or is made in `scratch`,
// which holds 32 * depth values (depth rounded up to 32). Weights are of type T; BFloat16 when quantised. int8: the
// values are q * kInt8Unit; sums are to be multiplied by the block's scales / kInt8Unit.
template <typename T, typename Operand>
const Operand* load_panel(const WeightView& weight, int64_t expert, int64_t column, int64_t k, int64_t depth,
                          Operand* scratch);

}  // namespace mixtral
