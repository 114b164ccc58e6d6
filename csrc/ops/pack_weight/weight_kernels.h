// The kernels that read packed blocks of bf16 weights and of quantised ones, by instruction set and format.
//
//                     rows, from registers                 panels of many rows
//   baseline          none                                 plain loops
//   avx2, avx512      bf16 int8 fp8 int4, as f32           the same decoding, stored
//   avx512_bf16       bf16 int8 fp8 int4, as bf16          the same decoding, stored; bf16 in place
//   amx               int8 int4, as bf16; int8, one row,   the same decoding, stored; bf16 in place
//                     as f32; bf16 in place
//
// Few rows, as in decoding, are multiplied with a block that is decoded in registers (int4 and fp8 on avx2 in the
// first-level cache, a step at a time): the weights cross memory once, packed. Many rows share a panel
// (../cpu/matmul.h). Either way an element's sum has one order (docs/numerics.md).
#pragma once

#include "pack_weight.h"

namespace mixtral {

// sums [count, rows, 32] = a [rows, depth] * blocks [count]. The values of a are bf16 ones, whatever their type.
template <typename Operand>
using RowsKernel = void (*)(const char* const* blocks, int64_t count, const Operand* a, int64_t rows, int64_t depth,
                            float* sums);

// Steps [step, step + steps) of a block whose rows are `depth` long -> out [steps, 1024], in the order of a panel of
// the operand's type. Values of int8 are q * kInt8Unit.
template <typename Operand>
using PanelKernel = void (*)(const char* block, int64_t depth, int64_t step, int64_t steps, Operand* out);

struct WeightKernels {
  RowsKernel<float> f32_rows;
  int64_t most_f32_rows;  // f32_rows takes 1 to so many rows: more are faster by panels
  RowsKernel<BFloat16> bf16_rows;
  int64_t most_bf16_rows;
  PanelKernel<float> f32_panel;      // null: by way of bf16_panel
  PanelKernel<BFloat16> bf16_panel;  // null: the block is one
};

// Of the instruction set in use, for weights of bf16. `format` is not kPlain.
const WeightKernels& weight_kernels(WeightFormat format);

// Of each instruction set, in the order of the formats from kPacked on.
inline constexpr int64_t kPackedFormats = 4;
extern const WeightKernels kPlainWeightKernels[kPackedFormats];
#if defined(__x86_64__)
extern const WeightKernels kAvx2WeightKernels[kPackedFormats];
extern const WeightKernels kAvx512WeightKernels[kPackedFormats];
extern const WeightKernels kAvx512Bf16WeightKernels[kPackedFormats];
extern const WeightKernels kAmxWeightKernels[kPackedFormats];
#endif

}  // namespace mixtral
