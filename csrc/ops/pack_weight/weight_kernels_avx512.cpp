// As in weight_kernels_avx2.cpp, with sixteen columns and twice the registers.
#include <algorithm>

#include "blocks_avx512.h"
#include "row_tiles.h"
#include "sums_avx512.h"
#include "weight_kernels.h"

#if defined(__x86_64__)

namespace mixtral {
namespace {

using namespace avx512;

// The products of one depth of kRows rows, `depth` apart, with kHalves times sixteen columns.
template <int kRows, int kHalves>
MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE void add_products(const float* a, int64_t depth, const __m512 (&weights)[kHalves],
                                                       Sums<kRows, kHalves>& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512 value = _mm512_set1_ps(a[r * depth]);
#pragma GCC unroll 4
    for (int i = 0; i < kHalves; ++i) sum[r][i] = _mm512_fmadd_ps(value, weights[i], sum[r][i]);
  }
}

// As row_tiles.h needs it.
template <typename Half>
struct F32Kernel {
  using Operand = float;
  static constexpr int kTileRows = 8;
  static constexpr bool kTwoBlocks = true;

  template <int kRows, int kBlocks = 1>
  MIXTRAL_TARGET_AVX512 __attribute__((noinline)) static void multiply(const char* block, const Operand* a,
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
          const float* at = a + k + g * 2 * kGroupPairs;
#pragma GCC unroll 4
          for (int p = 0; p < kGroupPairs; ++p, at += 2) {
            __m512 even[kHalves], odd[kHalves];
#pragma GCC unroll 4
            for (int i = 0; i < kHalves; ++i) {
              even[i] = Half::even(pairs[i].pair[p]);
              odd[i] = Half::odd(pairs[i].pair[p]);
            }
            add_products(at, depth, even, sum);
            add_products(at + 1, depth, odd, sum);
          }
        }
      }
      add_chain(sum, begin == 0, sums, second_sums);
    }
  }
};

// out [depth][32 columns]
template <typename Half>
MIXTRAL_TARGET_AVX512 void f32_panel(const char* block, int64_t depth, int64_t step, int64_t steps, float* out) {
  for (int64_t h = 0; h < 2; ++h) {
    Half half(block, depth, step, h);
    float* to = out + h * 16;
    for (int64_t s = 0; s < steps; ++s) {
      half.begin_step();
      for (int g = 0; g < kGroups; ++g) {
        const Pairs pairs = half.pairs(g);
#pragma GCC unroll 4
        for (int p = 0; p < kGroupPairs; ++p, to += 2 * kPanelColumns) {
          _mm512_storeu_ps(to, Half::even(pairs.pair[p]));
          _mm512_storeu_ps(to + kPanelColumns, Half::odd(pairs.pair[p]));
        }
      }
    }
  }
}

constexpr int64_t kMostRows = 64;

}  // namespace

template <typename Half>
MIXTRAL_TARGET_AVX512 void avx512::bf16_panel(const char* block, int64_t depth, int64_t step, int64_t steps,
                                              BFloat16* out) {
  Half halves[2] = {{block, depth, step, 0}, {block, depth, step, 1}};
  for (int64_t s = 0; s < steps; ++s)
    for (int h = 0; h < 2; ++h, out += kStepElements / 2) store_step(halves[h], out);
}

template void avx512::bf16_panel<Int8Half>(const char*, int64_t, int64_t, int64_t, BFloat16*);
template void avx512::bf16_panel<Fp8Half>(const char*, int64_t, int64_t, int64_t, BFloat16*);
template void avx512::bf16_panel<Int4Half>(const char*, int64_t, int64_t, int64_t, BFloat16*);

const WeightKernels kAvx512WeightKernels[kPackedFormats] = {
    {multiply_rows<F32Kernel<Bf16Half>>, kMostRows, nullptr, 0, f32_panel<Bf16Half>, nullptr},
    {multiply_rows<F32Kernel<Int8Half>>, kMostRows, nullptr, 0, f32_panel<Int8Half>, bf16_panel<Int8Half>},
    {multiply_rows<F32Kernel<Fp8Half>>, 8, nullptr, 0, f32_panel<Fp8Half>, bf16_panel<Fp8Half>},
    {multiply_rows<F32Kernel<Int4Half>>, kMostRows, nullptr, 0, f32_panel<Int4Half>, bf16_panel<Int4Half>},
};

}  // namespace mixtral

#endif
