// Weights are decoded eight columns at a time and multiplied at once, as f32. A tile of rows and columns keeps its sums
// in registers for a chain of depths.
//
// One row of a block is bound by the fused multiply-adds' latency of four cycles, with four registers of sums: eight
// weights a cycle. int4 takes 41 vector instructions for 64 weights, of which 30 have two or three of four ports: at
// best 6 weights a cycle. Measured on Zen 5, in the cache: bf16 7.9, int8 6.5, int4 4.6 weights a cycle; eight rows
// reach 86 % (int8) and 67 % (int4) of the peak of multiply-adds.
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

constexpr int64_t kMostRows = 16;

}  // namespace

const WeightKernels kAvx2WeightKernels[kPackedFormats] = {
    {multiply_rows<F32Kernel<Bf16Half>>, kMostRows, nullptr, 0, f32_panel<Bf16Half>, nullptr},
    {multiply_rows<F32Kernel<Int8Half>>, kMostRows, nullptr, 0, f32_panel<Int8Half>, bf16_panel<Int8Half>},
    {multiply_rows<F32Kernel<Fp8Half>>, 4, nullptr, 0, f32_panel<Fp8Half>, bf16_panel<Fp8Half>},
    {multiply_rows<F32Kernel<Int4Half>>, kMostRows, nullptr, 0, f32_panel<Int4Half>, bf16_panel<Int4Half>},
};

}  // namespace mixtral

#endif
