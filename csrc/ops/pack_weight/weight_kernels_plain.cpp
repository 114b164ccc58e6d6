// Plain loops, for processors without AVX2.
#include <cstring>

#include "../cpu/simd.h"
#include "e4m3.h"
#include "int4_levels.h"
#include "weight_kernels.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kPairWords = 16, kInt4Groups = 4, kInt4GroupBytes = 64;  // 16 columns; a group of pairs of one half

void int8_panel(const char* block, int64_t, int64_t step, int64_t steps, BFloat16* out) {
  const auto* values = reinterpret_cast<const int8_t*>(block) + step * kStepElements;
  for (int64_t i = 0; i < steps * kStepElements; ++i)
    out[i] = from_float<BFloat16>(static_cast<float>(values[i]) * kInt8Unit);
}

void fp8_panel(const char* block, int64_t depth, int64_t step, int64_t steps, BFloat16* out) {
  const auto* values = reinterpret_cast<const uint8_t*>(block) + step * kStepDepth;
  const auto* scales = reinterpret_cast<const float*>(block + depth * kBlockRows);
  for (int64_t s = 0; s < steps; ++s, values += kStepDepth, out += kStepElements)
    for (int64_t j = 0; j < kBlockRows; ++j)
      for (int64_t d = 0; d < kStepDepth; ++d) {
        const uint32_t bits = float_to_bits(from_e4m3(values[j * depth + d]) * scales[j]);  // a bf16 value
        out[pair_index(j, d)] = BFloat16(static_cast<uint16_t>(bits >> 16), BFloat16::from_bits());
      }
}

void int4_panel(const char* block, int64_t, int64_t first, int64_t steps, BFloat16* out) {
  const char* step = block + first * kInt4StepBytes;
  for (const char* end = step + steps * kInt4StepBytes; step < end; step += kInt4StepBytes) {
    const auto* scales = reinterpret_cast<const uint8_t*>(step);
    for (int64_t half = 0; half < 2; ++half) {
      uint16_t table_row[kStepDepth], exponent[kStepDepth];
      for (int64_t w = 0; w < kStepDepth; ++w) {
        const int scale = scales[half * kPairWords + w / 2];
        table_row[w] = static_cast<uint16_t>(scale % 2 * 16);
        exponent[w] = static_cast<uint16_t>((scale / 2 - 64) * 128);
      }
      for (int64_t group = 0; group < kInt4Groups; ++group) {
        uint16_t words[kStepDepth];
        std::memcpy(words, step + kBlockRows + (half * kInt4Groups + group) * kInt4GroupBytes, sizeof words);
        for (int64_t i = 0; i < 4; ++i, out += kStepDepth)
          for (int64_t w = 0; w < kStepDepth; ++w) {
            const uint16_t level = kInt4Levels[table_row[w] | (words[w] >> (4 * i) & 15)];
            out[w] = BFloat16(static_cast<uint16_t>(level + exponent[w]), BFloat16::from_bits());
          }
      }
    }
  }
}

}  // namespace

const WeightKernels kPlainWeightKernels[kPackedFormats] = {
    {nullptr, 0, nullptr, 0, nullptr, nullptr},     // bf16
    {nullptr, 0, nullptr, 0, nullptr, int8_panel},  //
    {nullptr, 0, nullptr, 0, nullptr, fp8_panel},   //
    {nullptr, 0, nullptr, 0, nullptr, int4_panel},
};

}  // namespace mixtral
