// As in weight_kernels_avx512.cpp, but a pair of depths is multiplied at once, as bf16.
#include <algorithm>
#include <cstring>

#include "blocks_avx512.h"
#include "weight_kernels.h"

#if defined(__x86_64__)

namespace mixtral {
namespace {

using namespace avx512;

// The products of one pair of depths of kRows rows, `depth` apart, with kHalves times sixteen columns.
template <int kRows, int kHalves>
MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE void add_products(const BFloat16* a, int64_t depth,
                                                            const __m512i (&weights)[kHalves],
                                                            __m512 (&sum)[kRows][kHalves]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    int32_t two;
    std::memcpy(&two, a + r * depth, sizeof two);
    const auto values = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
    for (int i = 0; i < kHalves; ++i) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], values, (__m512bh)weights[i]);
  }
}

// kRows rows of a [kRows, depth] times kBlocks blocks -> sums [kRows, 32] of each, `stride` apart.
template <typename Half, int kRows, int kBlocks>
MIXTRAL_TARGET_AVX512_BF16 __attribute__((noinline)) void multiply_rows(const char* const* blocks, int64_t block_stride,
                                                                        const BFloat16* a, int64_t depth, float* sums,
                                                                        int64_t stride) {
  constexpr int kHalves = 2 * kBlocks;
  const char* last = blocks[(kBlocks - 1) * block_stride];
  Half halves[4] = {{blocks[0], depth, 0, 0}, {blocks[0], depth, 0, 1}, {last, depth, 0, 0}, {last, depth, 0, 1}};
  for (int64_t begin = 0; begin < depth; begin += kChainDepth) {
    __m512 sum[kRows][kHalves];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kHalves; ++i) sum[r][i] = _mm512_setzero_ps();
    const int64_t end = std::min(depth, begin + kChainDepth);
    for (int64_t k = begin; k < end; k += kStepDepth) {
#pragma GCC unroll 4
      for (int i = 0; i < kHalves; ++i) halves[i].begin_step();
#pragma GCC unroll 1
      for (int g = 0; g < kGroups; ++g) {
        Pairs pairs[kHalves];
#pragma GCC unroll 4
        for (int i = 0; i < kHalves; ++i) pairs[i] = halves[i].pairs(g);
        const BFloat16* at = a + k + g * 2 * kGroupPairs;
#pragma GCC unroll 4
        for (int p = 0; p < kGroupPairs; ++p, at += 2) {
          __m512i weights[kHalves];
#pragma GCC unroll 4
          for (int i = 0; i < kHalves; ++i) weights[i] = Half::bf16(pairs[i].pair[p]);
          add_products(at, depth, weights, sum);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kHalves; ++i) {
        float* to = sums + i / 2 * stride + r * kPanelColumns + i % 2 * 16;
        const __m512 before = begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
        _mm512_storeu_ps(to, _mm512_add_ps(before, sum[r][i]));
      }
  }
}

// One row: two blocks at a time, since the sums of one wait for each other. Each half of the blocks is read in order.
template <typename Half>
void bf16_row(const char* const* blocks, int64_t count, const BFloat16* a, int64_t depth, float* sums) {
  const int64_t pairs = count / 2;
  for (int64_t i = 0; i < pairs; ++i)
    multiply_rows<Half, 1, 2>(blocks + i, pairs, a, depth, sums + i * kPanelColumns, pairs * kPanelColumns);
  if (count % 2 == 1) multiply_rows<Half, 1, 1>(blocks + count - 1, 0, a, depth, sums + (count - 1) * kPanelColumns, 0);
}

template <typename Half>
void bf16_rows(const char* const* blocks, int64_t count, const BFloat16* a, int64_t rows, int64_t depth, float* sums) {
  if (rows == 1) return bf16_row<Half>(blocks, count, a, depth, sums);
  for (int64_t i = 0; i < count; ++i) {
    int64_t r = 0;
    const auto multiply = [&](auto kernel, int64_t tile) {
      kernel(blocks + i, 0, a + r * depth, depth, sums + (i * rows + r) * kPanelColumns, 0);
      r += tile;
    };
    while (rows - r >= 8) multiply(multiply_rows<Half, 8, 1>, 8);
    if (rows - r >= 4) multiply(multiply_rows<Half, 4, 1>, 4);
    if (rows - r == 3) multiply(multiply_rows<Half, 3, 1>, 3);
    if (rows - r == 2) multiply(multiply_rows<Half, 2, 1>, 2);
    if (rows - r == 1) multiply(multiply_rows<Half, 1, 1>, 1);
  }
}

constexpr int64_t kMostRows = 64;

}  // namespace

const WeightKernels kAvx512Bf16WeightKernels[kPackedFormats] = {
    {nullptr, 0, bf16_rows<Bf16Half>, kMostRows, nullptr, nullptr},
    {nullptr, 0, bf16_rows<Int8Half>, kMostRows, nullptr, bf16_panel<Int8Half>},
    {nullptr, 0, bf16_rows<Fp8Half>, 8, nullptr, bf16_panel<Fp8Half>},
    {nullptr, 0, bf16_rows<Int4Half>, kMostRows, nullptr, bf16_panel<Int4Half>},
};

}  // namespace mixtral

#endif
