#include <cstring>

#include "../cpu/amx.h"
#include "../cpu/matmul.h"
#include "../cpu/simd.h"
#include "blocks_avx512.h"
#include "dequantize.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kPairWords = 16, kInt4Groups = 4, kInt4GroupBytes = 64;  // 16 columns; a group of pairs of one half

// ---- plain loops

MIXTRAL_INLINE void int8_steps(const int8_t* values, int64_t steps, BFloat16* out) {
  for (int64_t i = 0; i < steps * kStepElements; ++i)
    out[i] = from_float<BFloat16>(static_cast<float>(values[i]) * kInt8Unit);
}

MIXTRAL_INLINE void int4_step(const char* step, BFloat16* out) {
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

#if defined(__x86_64__)
// ---- the same values in AVX-512

template <typename Block>
MIXTRAL_TARGET_AVX512 void steps_avx512(const Block& block, int64_t begin, int64_t end, BFloat16* out) {
  for (int64_t step = begin; step < end; ++step)
    for (int64_t h = 0; h < 2; ++h, out += kTileElements) block.half(step, h).store(out);
}
#endif

}  // namespace

void dequantize_int8(const char* block, int64_t k, int64_t steps, BFloat16* out) {
#if defined(__x86_64__)
  const int64_t begin = k / kStepDepth;
  if (cpu_isa() >= CpuIsa::kAvx512) return steps_avx512(Int8Block{block}, begin, begin + steps, out);
#endif
  const auto* values = reinterpret_cast<const int8_t*>(block) + k * kBlockRows;
  for_cpu_isa([&] { int8_steps(values, steps, out); });
}

void dequantize_int4(const char* block, int64_t k, int64_t steps, BFloat16* out) {
#if defined(__x86_64__)
  const int64_t begin = k / kStepDepth;
  if (cpu_isa() >= CpuIsa::kAvx512) return steps_avx512(Int4Block{block}, begin, begin + steps, out);
#endif
  for (int64_t s = 0; s < steps; ++s, out += kStepElements)
    for_cpu_isa([&] { int4_step(block + (k / kStepDepth + s) * kInt4StepBytes, out); });
}

}  // namespace mixtral
