// As in weight_kernels_avx512.cpp, but a pair of depths is multiplied at once, as bf16.
#include <algorithm>
#include <cstring>

#include "blocks_avx512.h"
#include "weight_kernels.h"

#if defined(__x86_64__)

namespace mixtral {
namespace {

using namespace avx512;

// The products of one pair of depths of kRows rows, `depth` apart, with 32 columns.
template <int kRows>
MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE void add_products(const BFloat16* a, int64_t depth, __m512i left,
                                                            __m512i right, __m512 (&sum)[kRows][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    int32_t two;
    std::memcpy(&two, a + r * depth, sizeof two);
    const auto value = (__m512bh)_mm512_set1_epi32(two);
    sum[r][0] = _mm512_dpbf16_ps(sum[r][0], value, (__m512bh)left);
    sum[r][1] = _mm512_dpbf16_ps(sum[r][1], value, (__m512bh)right);
  }
}

// kRows rows of a [kRows, depth] times a block -> sums [kRows, 32].
template <typename Half, int kRows>
MIXTRAL_TARGET_AVX512_BF16 __attribute__((noinline)) void multiply_rows(const char* block, const BFloat16* a,
                                                                        int64_t depth, float* sums) {
  Half halves[2] = {{block, depth, 0, 0}, {block, depth, 0, 1}};
  for (int64_t begin = 0; begin < depth; begin += kChainDepth) {
    __m512 sum[kRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    const int64_t end = std::min(depth, begin + kChainDepth);
    for (int64_t k = begin; k < end; k += kStepDepth) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) halves[h].begin_step();
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        const Pairs left = halves[0].pairs(g), right = halves[1].pairs(g);
        const BFloat16* at = a + k + g * 2 * kGroupPairs;
#pragma GCC unroll 4
        for (int p = 0; p < kGroupPairs; ++p, at += 2)
          add_products<kRows>(at, depth, Half::bf16(left.pair[p]), Half::bf16(right.pair[p]), sum);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        float* to = sums + r * kPanelColumns + h * 16;
        const __m512 before = begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
        _mm512_storeu_ps(to, _mm512_add_ps(before, sum[r][h]));
      }
  }
}

template <typename Half>
void bf16_rows(const char* block, const BFloat16* a, int64_t rows, int64_t depth, float* sums) {
  for (; rows >= 8; rows -= 8, a += 8 * depth, sums += 8 * kPanelColumns) multiply_rows<Half, 8>(block, a, depth, sums);
  for (; rows >= 4; rows -= 4, a += 4 * depth, sums += 4 * kPanelColumns) multiply_rows<Half, 4>(block, a, depth, sums);
  if (rows == 3) multiply_rows<Half, 3>(block, a, depth, sums);
  if (rows == 2) multiply_rows<Half, 2>(block, a, depth, sums);
  if (rows == 1) multiply_rows<Half, 1>(block, a, depth, sums);
}

constexpr int64_t kMostRows = 64;

}  // namespace

const WeightKernels kAvx512Bf16WeightKernels[kPackedFormats] = {
    {nullptr, 0, nullptr, 0, nullptr, nullptr},  // bf16: in place, by the micro-kernel
    {nullptr, 0, bf16_rows<Int8Half>, kMostRows, nullptr, bf16_panel<Int8Half>},
    {nullptr, 0, bf16_rows<Fp8Half>, 8, nullptr, bf16_panel<Fp8Half>},
    {nullptr, 0, bf16_rows<Int4Half>, kMostRows, nullptr, bf16_panel<Int4Half>},
};

}  // namespace mixtral

#endif
