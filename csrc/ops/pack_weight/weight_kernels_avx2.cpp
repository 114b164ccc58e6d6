// Weights are decoded eight columns at a time and multiplied at once, as f32. A tile of rows and columns keeps its sums
// in registers for a chain of depths.
//
// One row of a block of bf16 or int8 is bound by the fused multiply-adds' latency of four cycles, with four registers
// of sums: 64 weights in 8 cycles. Measured on Zen 3, in the cache: bf16 9.4, int8 10.5 cycles.
//
// int4 is decoded and multiplied in turn. 64 weights take 21 vector instructions to decode, 13 of which shuffle or
// shift and have two of four ports: 6.4 cycles. They take 16 to multiply, any four a cycle: 4 cycles. Measured: 7.4
// and 5.3 alone, 12.6 in turn. Eight rows take 44 cycles, where 32 are the peak of
// multiply-adds.
#include "blocks_avx2.h"
#include "row_tiles.h"
#include "weight_kernels.h"

#if defined(__x86_64__)

namespace mixtral {
namespace {

using namespace avx2;

// The products of one depth of kRows rows, `depth` apart, with sixteen columns, whose sums begin at register `first`.
template <int kRows, int kRegisters>
MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE void add_products(const float* a, int64_t depth, __m256 left, __m256 right,
                                                     int first, __m256 (&sum)[kRows][kRegisters]) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const __m256 value = _mm256_broadcast_ss(a + r * depth);
    sum[r][first] = _mm256_fmadd_ps(value, left, sum[r][first]);
    sum[r][first + 1] = _mm256_fmadd_ps(value, right, sum[r][first + 1]);
  }
}

// kRows rows of a [kRows, depth] times kHalves halves of a block from half `first` on -> sums [kRows, 32].
template <typename Half, int kRows, int kHalves>
MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE void multiply_tile(const char* block, int64_t first, const float* a, int64_t depth,
                                                      float* sums) {
  Half halves[2] = {{block, depth, 0, first}, {block, depth, 0, 1}};
  sums += first * 16;
  for (int64_t begin = 0; begin < depth; begin += kChainDepth) {
    __m256 sum[kRows][kHalves * kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (__m256& vector : sum[r]) vector = _mm256_setzero_ps();
    const int64_t end = std::min(depth, begin + kChainDepth);
    for (int64_t k = begin; k < end; k += kStepDepth) {
#pragma GCC unroll 2
      for (int i = 0; i < kHalves; ++i) halves[i].begin_step();
#pragma GCC unroll 1
      for (int g = 0; g < kGroups; ++g)  // not unrolled: the loop has to fit the cache of decoded instructions
#pragma GCC unroll 2
        for (int i = 0; i < kHalves; ++i) {
          const auto left = halves[i].pairs(g, 0), right = halves[i].pairs(g, 1);
          const float* at = a + k + g * 2 * kGroupPairs;
          asm("" : "+r"(at));  // else the compiler keeps the values of a for the next half and runs out of registers
#pragma GCC unroll 4
          for (int p = 0; p < kGroupPairs; ++p, at += 2) {
            add_products(at, depth, Half::even(left[p]), Half::even(right[p]), i * kVectors, sum);
            add_products(at + 1, depth, Half::odd(left[p]), Half::odd(right[p]), i * kVectors, sum);
          }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kHalves * kVectors; ++i) {
        float* to = sums + r * kPanelColumns + i * 8;
        const __m256 before = begin == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(to);
        _mm256_storeu_ps(to, _mm256_add_ps(before, sum[r][i]));
      }
  }
}

// As row_tiles.h needs it.
template <typename Half>
struct F32Kernel {
  using Operand = float;
  static constexpr int kTileRows = 4;
  static constexpr bool kTwoBlocks = false;

  template <int kRows>
  MIXTRAL_TARGET_AVX2 __attribute__((noinline)) static void multiply(const char* block, const float* a, int64_t depth,
                                                                     float* sums) {
    if constexpr (kRows <= 2) {
      multiply_tile<Half, kRows, 2>(block, 0, a, depth, sums);
    } else {
      for (int64_t h = 0; h < 2; ++h) multiply_tile<Half, kRows, 1>(block, h, a, depth, sums);
    }
  }
};

// int4: half a step is decoded for all rows at once, into the first-level cache, and multiplied from there. Registers
// hold either what decoding needs or sums; both at once do not fit. One row takes two blocks at a time, for with eight
// registers of sums no multiply-add waits for another.
//
// A register of pairs lies in the upper half of a line. So a load that begins two bytes earlier has the even depths
// where odd ones are, and a mask makes f32 of both. A shift would take one of the two ports that multiply-adds leave
// it.
constexpr int64_t kLineBytes = 64, kHalfLines = kGroups * kGroupPairs * kVectors;

MIXTRAL_TARGET_AVX2 MIXTRAL_INLINE void decode_half_step(Int4Half& half, char* lines) {
  half.begin_step();
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const auto pairs = half.pairs(g, v);
#pragma GCC unroll 4
      for (int p = 0; p < kGroupPairs; ++p) {
        char* line = lines + ((g * kGroupPairs + p) * kVectors + v) * kLineBytes;
        _mm256_store_si256(reinterpret_cast<__m256i*>(line + kLineBytes / 2), pairs[p]);
      }
    }
}

// sums [kRows, `stride` apart][kHalves][16] += kRows rows of a, `depth` apart, times kHalves decoded halves.
template <int kRows, int kHalves>
MIXTRAL_TARGET_AVX2 __attribute__((noinline)) void add_halves(const char* lines, const float* a, int64_t depth,
                                                              float* sums, int64_t stride) {
  constexpr int kRegisters = kHalves * kVectors;
  __m256 sum[kRows][kRegisters];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; ++i) sum[r][i] = _mm256_load_ps(sums + r * stride + i * 8);
#pragma GCC unroll 1
  for (int pair = 0; pair < kStepDepth / 2; ++pair, a += 2, lines += kVectors * kLineBytes)
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; i += kVectors) {
      const char* at = lines + i / kVectors * kHalfLines * kLineBytes + kLineBytes / 2;
#pragma GCC unroll 2
      for (int d = 0; d < 2; ++d) {
        const __m256 left = Bf16Pairs::odd(load(at - 2 + 2 * d));
        const __m256 right = Bf16Pairs::odd(load(at + kLineBytes - 2 + 2 * d));
        add_products(a + d, depth, left, right, i, sum);
      }
    }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; ++i) _mm256_store_ps(sums + r * stride + i * 8, sum[r][i]);
}

// The same for any number of rows and one or two blocks.
MIXTRAL_TARGET_AVX2 inline void add_step(const char* lines, int64_t blocks, const float* a, int64_t rows, int64_t depth,
                                         float* sums) {
  const int64_t stride = blocks * kPanelColumns;
  const auto add = [&](auto add_tile, int64_t halves) {
    for (int64_t h = 0; h < 2 * blocks; h += halves)
      add_tile(lines + h * kHalfLines * kLineBytes, a, depth, sums + h * 16, stride);
  };
  for (; rows >= 4; rows -= 4, a += 4 * depth, sums += 4 * stride) add(add_halves<4, 1>, 1);
  if (rows == 3) add(add_halves<3, 1>, 1);
  if (rows == 2) add(add_halves<2, 2>, 2);
  if (rows == 1) blocks == 2 ? add(add_halves<1, 4>, 4) : add(add_halves<1, 2>, 2);
}

constexpr int64_t kMostRows = 16;

// Rows of a times one or two blocks -> sums[block] [rows, 32].
MIXTRAL_TARGET_AVX2 void multiply_decoded(const char* const (&block)[2], int64_t blocks, const float* a, int64_t rows,
                                          int64_t depth, float* const (&sums)[2]) {
  alignas(kLineBytes) char lines[4 * kHalfLines * kLineBytes];
  alignas(32) float chain[kMostRows * 2 * kPanelColumns];
  Int4Half halves[4] = {
      {block[0], depth, 0, 0}, {block[0], depth, 0, 1}, {block[1], depth, 0, 0}, {block[1], depth, 0, 1}};
  for (int64_t begin = 0; begin < depth; begin += kChainDepth) {
    std::fill_n(chain, rows * blocks * kPanelColumns, 0.0f);
    for (int64_t k = begin; k < std::min(depth, begin + kChainDepth); k += kStepDepth) {
      for (int64_t h = 0; h < 2 * blocks; ++h) decode_half_step(halves[h], lines + h * kHalfLines * kLineBytes);
      add_step(lines, blocks, a + k, rows, depth, chain);
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < blocks; ++i)
        for (int64_t j = 0; j < kPanelColumns; ++j) {
          float* to = sums[i] + r * kPanelColumns + j;
          *to = (begin == 0 ? 0.0f : *to) + chain[(r * blocks + i) * kPanelColumns + j];
        }
  }
}

// A RowsKernel. Each half of the blocks is read in order.
void multiply_rows_decoded(const char* const* blocks, int64_t count, const float* a, int64_t rows, int64_t depth,
                           float* sums) {
  const int64_t pairs = count / 2, size = rows * kPanelColumns;
  for (int64_t i = 0; i < pairs; ++i)
    multiply_decoded({blocks[i], blocks[i + pairs]}, 2, a, rows, depth, {sums + i * size, sums + (i + pairs) * size});
  if (count % 2 == 1)
    multiply_decoded({blocks[count - 1], blocks[count - 1]}, 1, a, rows, depth, {sums + (count - 1) * size, nullptr});
}

// out [depth][32 columns]
template <typename Half>
MIXTRAL_TARGET_AVX2 void f32_panel(const char* block, int64_t depth, int64_t step, int64_t steps, float* out) {
  for (int64_t h = 0; h < 2; ++h) {
    Half half(block, depth, step, h);
    float* to = out + h * 16;
    for (int64_t s = 0; s < steps; ++s) {
      half.begin_step();
      for (int g = 0; g < kGroups; ++g, to += 2 * kGroupPairs * kPanelColumns)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const auto pairs = half.pairs(g, v);
#pragma GCC unroll 4
          for (int p = 0; p < kGroupPairs; ++p) {
            _mm256_storeu_ps(to + 2 * p * kPanelColumns + v * 8, Half::even(pairs[p]));
            _mm256_storeu_ps(to + (2 * p + 1) * kPanelColumns + v * 8, Half::odd(pairs[p]));
          }
        }
    }
  }
}

// out [2 halves][16 pairs][16 columns][2] for each step
template <typename Half>
MIXTRAL_TARGET_AVX2 void bf16_panel(const char* block, int64_t depth, int64_t step, int64_t steps, BFloat16* out) {
  for (int64_t h = 0; h < 2; ++h) {
    Half half(block, depth, step, h);
    for (int64_t s = 0; s < steps; ++s) {
      half.begin_step();
      BFloat16* to = out + (2 * s + h) * kStepElements / 2;
      for (int g = 0; g < kGroups; ++g, to += kGroupPairs * 32)
        for (int v = 0; v < kVectors; ++v) {
          const auto pairs = half.pairs(g, v);
#pragma GCC unroll 4
          for (int p = 0; p < kGroupPairs; ++p)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + p * 32 + v * 16), Half::bf16(pairs[p]));
        }
    }
  }
}

}  // namespace

const WeightKernels kAvx2WeightKernels[kPackedFormats] = {
    {multiply_rows<F32Kernel<Bf16Half>>, kMostRows, nullptr, 0, f32_panel<Bf16Half>, nullptr},
    {multiply_rows<F32Kernel<Int8Half>>, kMostRows, nullptr, 0, f32_panel<Int8Half>, bf16_panel<Int8Half>},
    {multiply_rows<F32Kernel<Fp8Half>>, 4, nullptr, 0, f32_panel<Fp8Half>, bf16_panel<Fp8Half>},
    {multiply_rows_decoded, kMostRows, nullptr, 0, f32_panel<Int4Half>, bf16_panel<Int4Half>},
};

}  // namespace mixtral

#endif
