// The table of kernels by instruction set and format has no gap: above the baseline, no format is left to plain loops.
#include <gtest/gtest.h>

#include "ops/pack_weight/weight_kernels.h"

#if defined(__x86_64__)

namespace mixtral {
namespace {

struct InstructionSet {
  const char* name;
  const WeightKernels* kernels;
  bool multiplies_bf16;
};

const InstructionSet kInstructionSets[] = {{"avx2", kAvx2WeightKernels, false},
                                           {"avx512", kAvx512WeightKernels, false},
                                           {"avx512_bf16", kAvx512Bf16WeightKernels, true},
                                           {"amx", kAmxWeightKernels, true}};

class EveryInstructionSet : public testing::TestWithParam<InstructionSet> {};
INSTANTIATE_TEST_SUITE_P(, EveryInstructionSet, testing::ValuesIn(kInstructionSets),
                         [](const auto& info) { return info.param.name; });

TEST_P(EveryInstructionSet, HasPanelsOfItsOwnForEachFormat) {
  const auto& [name, kernels, multiplies_bf16] = GetParam();
  for (int64_t format = 0; format < kPackedFormats; ++format) {
    const bool is_quantized = format > 0;  // a block of bf16 is a panel
    EXPECT_EQ(kernels[format].bf16_panel != nullptr, is_quantized) << format;
    EXPECT_EQ(kernels[format].f32_panel != nullptr, !multiplies_bf16) << format;
    if (is_quantized) {
      EXPECT_NE(kernels[format].bf16_panel, kPlainWeightKernels[format].bf16_panel) << format;
    }
  }
}

TEST_P(EveryInstructionSet, MultipliesFewRowsWithoutAPanel) {
  const auto& [name, kernels, multiplies_bf16] = GetParam();
  for (int64_t format = 0; format < kPackedFormats; ++format) {
    const bool is_amx = kernels == kAmxWeightKernels;
    const bool in_place = is_amx && format == 0;  // by the micro-kernel
    const bool is_fp8_of_amx = is_amx && format == 2;
    const bool has_rows = kernels[format].f32_rows != nullptr || kernels[format].bf16_rows != nullptr;
    EXPECT_EQ(has_rows, !in_place && !is_fp8_of_amx) << format;
    EXPECT_EQ(kernels[format].f32_rows != nullptr, kernels[format].most_f32_rows > 0) << format;
    EXPECT_EQ(kernels[format].bf16_rows != nullptr, kernels[format].most_bf16_rows > 0) << format;
  }
}

}  // namespace
}  // namespace mixtral

#endif
