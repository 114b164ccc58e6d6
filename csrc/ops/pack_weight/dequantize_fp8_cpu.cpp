#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "../cpu/transpose.h"
#include "dequantize.h"
#include "e4m3.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kRows = 16;  // of one transposition: half a step

// Depths [k, k + 32) of rows of e4m3 values that are `depth` apart -> out [16][32]
MIXTRAL_INLINE void widen_rows(const uint8_t* values, const float* scales, int64_t depth, BFloat16 (*out)[kStepDepth]) {
  for (int64_t j = 0; j < kRows; ++j)
    for (int64_t d = 0; d < kStepDepth; ++d) {
      const uint32_t bits = float_to_bits(from_e4m3(values[j * depth + d]) * scales[j]);  // a bf16 value
      out[j][d] = BFloat16(static_cast<uint16_t>(bits >> 16), BFloat16::from_bits());
    }
}

}  // namespace

void dequantize_fp8(const char* block, int64_t depth, int64_t k, int64_t steps, BFloat16* out) {
  const auto* values = reinterpret_cast<const uint8_t*>(block) + k;
  const auto* scales = reinterpret_cast<const float*>(block + depth * kBlockRows);
  BFloat16 rows[kRows][kStepDepth];
  const void* words[kRows];
  for (int64_t j = 0; j < kRows; ++j) words[j] = rows[j];
  for (int64_t s = 0; s < steps; ++s, values += kStepDepth)
    for (int64_t first = 0; first < kBlockRows; first += kRows, out += kRows * kStepDepth) {
      for_cpu_isa([&] { widen_rows(values + first * depth, scales + first, depth, rows); });
      transpose_words(words, out, kRows);
    }
}

}  // namespace mixtral
