// A step of a few blocks at a time, first one half of all of them, then the other, for all rows. So each block is read
// once, in order, and the processor's own prefetchers keep up: on Zen 3 one core reads bf16 weights as fast as it reads
// memory at all. Halves in turn within a block, or instructions that prefetch, lower that by a third: an access that
// finds its line fetched does not train the prefetchers.
//
// bf16 and int8 are widened in registers. int4 and fp8 are decoded into the first-level cache first. A tile of rows and
// columns then has eight registers of sums, so that no multiply-add waits for another. Cycles of 64 weights and one
// row, measured on Zen 3 in the cache: bf16 6.7, int8 9.4, int4 12.6, fp8 39. Peak of one row: 4 to multiply.
//
// int8 takes 20 instructions to widen and 8 to multiply, any four a cycle: 7. int4 takes 21 vector instructions to
// decode, 13 of which shuffle or shift and have two of four ports: 6.4 cycles, and 16 to mask and multiply.
#include <algorithm>
#include <utility>

#include "blocks_avx2.h"
#include "weight_kernels.h"

#if defined(__x86_64__)

namespace mixtral {
namespace {

using namespace avx2;

// Adds the products of one depth of kRows rows, `depth` apart, with sixteen columns, whose sums begin at register
// `first`.
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

constexpr int64_t kHalfColumns = kPanelColumns / 2;

// kRows rows of a, `depth` apart, times the steps of kHalves halves, added to sums [kHalves, `stride`
// apart][kRows][16].
template <int kRows, int kHalves, typename Half>
MIXTRAL_TARGET_AVX2 __attribute__((noinline)) void add_tile(const Half* halves, const float* a, int64_t depth,
                                                            float* sums, int64_t stride) {
  __m256 sum[kRows][kHalves * kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kHalves * kVectors; ++i)
      sum[r][i] = _mm256_load_ps(sums + i / kVectors * stride + r * kHalfColumns + i % kVectors * 8);
#pragma GCC unroll 1
  for (int p = 0; p < kStepDepth / 2; ++p, a += 2)
#pragma GCC unroll 4
    for (int i = 0; i < kHalves; ++i) {
      const auto left = halves[i].pair(p, 0), right = halves[i].pair(p, 1);
      add_products(a, depth, Half::even(left), Half::even(right), i * kVectors, sum);
      const float* next = a + 1;
      // Else the compiler loads the values of both depths first, and runs out of registers.
      if constexpr (kRows > 1) asm("" : "+r"(next) : "x"(sum[kRows - 1][i * kVectors]));
      add_products(next, depth, Half::odd(left), Half::odd(right), i * kVectors, sum);
    }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kHalves * kVectors; ++i)
      _mm256_store_ps(sums + i / kVectors * stride + r * kHalfColumns + i % kVectors * 8, sum[r][i]);
}

// The same of `rows` rows and kHalves halves, the first ones of all blocks before the others, in tiles of at most eight
// registers of sums. Only halves that are in the cache already may be multiplied beside others of their block.
template <int kHalves, typename Half>
void add_step(const Half* halves, const float* a, int64_t rows, int64_t depth, float* sums) {
  constexpr int kMost = Half::kInCache ? kHalves : kHalves / 2, kPair = std::min(kMost, 2), kFour = std::min(kMost, 4);
  const int64_t stride = rows * kHalfColumns;
  const auto add = [&](auto add_tile, int64_t at_once) {
    for (int64_t i = 0; i < kHalves; i += at_once) add_tile(halves + i, a, depth, sums + i * stride, stride);
  };
  for (; rows >= 4; rows -= 4, a += 4 * depth, sums += 4 * kHalfColumns) add(add_tile<4, 1, Half>, 1);
  if (rows == 3) add(add_tile<3, 1, Half>, 1);
  if (rows == 2) add(add_tile<2, kPair, Half>, kPair);
  if (rows == 1) add(add_tile<1, kFour, Half>, kFour);
}

// sums [rows][2][16] = or += chain [2][rows][16]
MIXTRAL_TARGET_AVX2 inline void add_chain(const float* chain, int64_t rows, bool is_first, float* sums) {
  for (int64_t h = 0; h < 2; ++h)
    for (int64_t r = 0; r < rows; ++r, chain += kHalfColumns)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + r * kPanelColumns + h * kHalfColumns + v * 8;
        const __m256 before = is_first ? _mm256_setzero_ps() : _mm256_loadu_ps(to);
        _mm256_storeu_ps(to, _mm256_add_ps(before, _mm256_load_ps(chain + v * 8)));
      }
}

constexpr int64_t kMostRows = 16;

// Rows of a times kBlocks blocks -> sums [kBlocks, rows, 32].
template <typename Half, int64_t kBlocks, size_t... kHalf>
MIXTRAL_TARGET_AVX2 void multiply_blocks(const char* const* blocks, const float* a, int64_t rows, int64_t depth,
                                         float* sums, std::index_sequence<kHalf...>) {
  constexpr int64_t kHalves = 2 * kBlocks;
  alignas(32) float chain[kHalves * kMostRows * kHalfColumns];  // [half][block][rows][16]
  Half halves[] = {Half(blocks[kHalf % kBlocks], depth, 0, kHalf / kBlocks)...};
  for (int64_t begin = 0; begin < depth; begin += kChainDepth) {
    std::fill_n(chain, kHalves * rows * kHalfColumns, 0.0f);
    for (int64_t k = begin; k < std::min(depth, begin + kChainDepth); k += kStepDepth) {
      for (Half& half : halves) half.begin_step();
      add_step<kHalves>(halves, a + k, rows, depth, chain);
    }
    add_chain(chain, kBlocks * rows, begin == 0, sums);
  }
}

// A RowsKernel, which takes kBlocks at a time.
template <typename Half, int64_t kBlocks>
void multiply_rows(const char* const* blocks, int64_t count, const float* a, int64_t rows, int64_t depth, float* sums) {
  for (; count >= kBlocks; count -= kBlocks, blocks += kBlocks, sums += kBlocks * rows * kPanelColumns)
    multiply_blocks<Half, kBlocks>(blocks, a, rows, depth, sums, std::make_index_sequence<2 * kBlocks>());
  if constexpr (kBlocks > 1)
    if (count > 0) multiply_rows<Half, kBlocks / 2>(blocks, count, a, rows, depth, sums);
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
    {multiply_rows<Bf16Half, 4>, kMostRows, nullptr, 0, f32_panel<Bf16Half>, nullptr},
    {multiply_rows<Int8Half, 4>, kMostRows, nullptr, 0, f32_panel<Int8Half>, bf16_panel<Int8Half>},
    {multiply_rows<Decoded<Fp8Half>, 1>, 8, nullptr, 0, f32_panel<Fp8Half>, bf16_panel<Fp8Half>},
    {multiply_rows<Decoded<Int4Half>, 2>, kMostRows, nullptr, 0, f32_panel<Int4Half>, bf16_panel<Int4Half>},
};

}  // namespace mixtral

#endif
