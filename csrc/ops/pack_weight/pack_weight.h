// pack_weight:   weights [E, N, Kdim] in the order in which the CPU kernels read them, optionally quantised. Their rows
//                are the columns of a product. CUDA kernels read the same bytes.
// unpack_weight: back to [E, N, Kdim].
//
// A block holds 32 rows; it is one panel of product_order.h, a sequence of steps of 32 depths. N and Kdim are multiples
// of 32, and the shape of a packed weight tells them.
//
//   quantize  packed                          one block
//   none      float [E, N/32, Kdim/32, 1024]  steps; bf16 in pair order
//   int8      Char  [E, N/32, 32*Kdim + 128]  steps of 1024 values in pair order; then a f32 scale for each row
//   fp8       Float8_e4m3fn, likewise         rows of Kdim e4m3 values; then a f32 scale for each row
//   int4      Byte  [E, N/32, Kdim/32, 544]   steps: a byte of scale for each row, then 2 halves of 256 bytes
//
// int8: a weight is scale * q with q in [-127, 127]. Each row has one scale, never zero or subnormal. The CPU kernels
// multiply by q, which is exact in bf16, and at the end multiply each sum by its scale. unpack_weight rounds scale * q
// to bf16.
//
// fp8: a weight is scale * e4m3, exact in bf16. Each row has one scale, a power of two (e4m3.h). In a product, the rows
// of the left operand are rounded in the same way.
//
// int4: a weight is s * (q + 1/2), rounded to bf16, with q in [-8, 7]: sixteen levels, none of them zero. 32 depths of
// a row share a scale s, a power of the square root of two. All levels at all scales are then 32 bf16 values times a
// power of two, and one table look-up finds them. Scale byte e means
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

// kTransposed: [E, depth, columns], as a weight looks to its own gradient's products. No tensor of a user has it.
enum class WeightFormat { kTransposed, kPlain, kPacked, kInt8, kFp8, kInt4 };

inline constexpr int64_t kBlockRows = kPanelColumns;
inline constexpr int64_t kScaleGroup = kStepDepth;                                           // depths of an int4 scale
inline constexpr int64_t kInt4StepBytes = kBlockRows + kStepElements / 2;                    // scales, nibbles
inline constexpr int64_t kRowScaleBytes = kBlockRows * static_cast<int64_t>(sizeof(float));  // of an int8 or fp8 block
inline constexpr float kInt8Unit = 65536;  // int8 panels hold q * 2^16: the bf16 values that are cheapest to make of q

MIXTRAL_HOST_DEVICE constexpr bool is_quantized(WeightFormat format) { return format > WeightFormat::kPacked; }

// Whether a block ends with an f32 scale for each of its rows.
MIXTRAL_HOST_DEVICE constexpr bool has_row_scales(WeightFormat format) {
  return format == WeightFormat::kInt8 || format == WeightFormat::kFp8;
}

// The last dimension of a packed weight of `depth` depths.
MIXTRAL_HOST_DEVICE constexpr int64_t packed_last_size(WeightFormat format, int64_t depth) {
  if (has_row_scales(format)) return kBlockRows * depth + kRowScaleBytes;
  return format == WeightFormat::kInt4 ? kInt4StepBytes : kStepElements;
}

// Bytes of one packed block, for values of `element_size` bytes.
MIXTRAL_HOST_DEVICE constexpr int64_t packed_block_bytes(WeightFormat format, int64_t depth, int64_t element_size) {
  if (has_row_scales(format)) return packed_last_size(format, depth);
  return format == WeightFormat::kInt4 ? depth / kStepDepth * kInt4StepBytes : kBlockRows * depth * element_size;
}

// Weights of a grouped product in any format; `data` is contiguous.
struct WeightView {
  WeightFormat format;
  const void* data;
  int64_t experts, columns, depth;  // E, N, Kdim
};

// The packed block of columns [column, column + 32) of bf16 or quantised weights; column is a multiple of 32.
inline const char* packed_block(const WeightView& weight, int64_t expert, int64_t column) {
  return static_cast<const char*>(weight.data) + (expert * weight.columns + column) / kBlockRows *
                                                     packed_block_bytes(weight.format, weight.depth, sizeof(BFloat16));
}

// Blocks [begin, end) of all experts' blocks: weight [E*N, Kdim] -> out. scales [E*N, Kdim/32] of int4, or null for the
// scales of least squared error. Returns false if a value to be quantised is 2^66 or more, inf or NaN.
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

// The panel of columns [column, column + 32) of `expert` at depths [k, k + depth), with zeros for columns and depths
// that the weight lacks; column and k are multiples of 32. Returns the weight itself if its format is that of a panel,
// else fills `scratch`, 32 * (depth rounded up to 32) values. Weights are of type T; BFloat16 when quantised. Panels of
// int8 hold q * kInt8Unit: multiply sums by the block's scales / kInt8Unit.
template <typename T, typename Operand>
const Operand* load_panel(const WeightView& weight, int64_t expert, int64_t column, int64_t k, int64_t depth,
                          Operand* scratch);

// Fetches share `share` of `shares` of the memory that load_panel reads for that panel into the cache. For the formats
// without packing, whose panels are made of rows that lie far apart: no processor expects the next one by itself.
template <typename T>
void prefetch_panel(const WeightView& weight, int64_t expert, int64_t column, int64_t k, int64_t depth, int64_t share,
                    int64_t shares);

}  // namespace mixtral
