// As in weight_kernels_avx512.cpp, but a pair of depths is multiplied at once, as bf16.
#include <algorithm>
#include <cstring>

#include "blocks_avx512.h"
#include "row_tiles.h"
#include "sums_avx512.h"
#include "weight_kernels.h"

#if defined(__x86_64__)

namespace mixtral {
namespace {

using namespace avx512;

// The products of one pair of depths of kRows rows, `depth` apart, with kHalves times sixteen columns.
template <int kRows, int kHalves>
MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE void add_products(const BFloat16* a, int64_t depth,
                                                            const __m512i (&weights)[kHalves],
                                                            Sums<kRows, kHalves>& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    int32_t two;
    std::memcpy(&two, a + r * depth, sizeof two);
    const auto values = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
    for (int i = 0; i < kHalves; ++i) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], values, (__m512bh)weights[i]);
  }
}

// As row_tiles.h needs it.
template <typename Half>
struct Bf16Kernel {
  using Operand = BFloat16;
  static constexpr int kTileRows = 8;
  static constexpr bool kTwoBlocks = true;

  template <int kRows, int kBlocks = 1>
  MIXTRAL_TARGET_AVX512_BF16 __attribute__((noinline)) static void multiply(const char* block, const Operand* a,
                                                                            int64_t depth, float* sums,
                                                                            const char* second_block = nullptr,
                                                                            float* second_sums = nullptr) {
    constexpr int kHalves = 2 * kBlocks;
    const char* last = kBlocks == 2 ? second_block : block;
    Half halves[4] = {{block, depth, 0, 0}, {block, depth, 0, 1}, {last, depth, 0, 0}, {last, depth, 0, 1}};
    for (int64_t begin = 0; begin < depth; begin += kChainDepth) {
      Sums<kRows, kHalves> sum;
      set_zero(sum);
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
      add_chain(sum, begin == 0, sums, second_sums);
    }
  }
};

constexpr int64_t kMostRows = 64;

}  // namespace

const WeightKernels kAvx512Bf16WeightKernels[kPackedFormats] = {
    {nullptr, 0, multiply_rows<Bf16Kernel<Bf16Half>>, kMostRows, nullptr, nullptr},
    {nullptr, 0, multiply_rows<Bf16Kernel<Int8Half>>, kMostRows, nullptr, bf16_panel<Int8Half>},
    {nullptr, 0, multiply_rows<Bf16Kernel<Fp8Half>>, 8, nullptr, bf16_panel<Fp8Half>},
    {nullptr, 0, multiply_rows<Bf16Kernel<Int4Half>>, kMostRows, nullptr, bf16_panel<Int4Half>},
};

}  // namespace mixtral

#endif
