// As in weight_kernels_avx2.cpp, with sixteen columns and twice the registers.
#include <algorithm>

#include "blocks_avx512.h"
#include "weight_kernels.h"

#if defined(__x86_64__)

namespace mixtral {
namespace {

using namespace avx512;

// The products of one depth of kRows rows, `depth` apart, with 32 columns.
template <int kRows>
MIXTRAL_TARGET_AVX512 MIXTRAL_INLINE void add_products(const float* a, int64_t depth, __m512 left, __m512 right,
                                                       __m512 (&sum)[kRows][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const __m512 value = _mm512_set1_ps(a[r * depth]);
    sum[r][0] = _mm512_fmadd_ps(value, left, sum[r][0]);
    sum[r][1] = _mm512_fmadd_ps(value, right, sum[r][1]);
  }
}

// kRows rows of a [kRows, depth] times a block -> sums [kRows, 32].
template <typename Half, int kRows>
MIXTRAL_TARGET_AVX512 __attribute__((noinline)) void multiply_rows(const char* block, const float* a, int64_t depth,
                                                                   float* sums) {
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
        const float* at = a + k + g * 2 * kGroupPairs;
#pragma GCC unroll 4
        for (int p = 0; p < kGroupPairs; ++p, at += 2) {
          add_products<kRows>(at, depth, Half::even(left.pair[p]), Half::even(right.pair[p]), sum);
          add_products<kRows>(at + 1, depth, Half::odd(left.pair[p]), Half::odd(right.pair[p]), sum);
        }
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
void f32_rows(const char* block, const float* a, int64_t rows, int64_t depth, float* sums) {
  for (; rows >= 8; rows -= 8, a += 8 * depth, sums += 8 * kPanelColumns) multiply_rows<Half, 8>(block, a, depth, sums);
  for (; rows >= 4; rows -= 4, a += 4 * depth, sums += 4 * kPanelColumns) multiply_rows<Half, 4>(block, a, depth, sums);
  if (rows == 3) multiply_rows<Half, 3>(block, a, depth, sums);
  if (rows == 2) multiply_rows<Half, 2>(block, a, depth, sums);
  if (rows == 1) multiply_rows<Half, 1>(block, a, depth, sums);
}

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
    {f32_rows<Bf16Half>, kMostRows, nullptr, 0, f32_panel<Bf16Half>, nullptr},
    {f32_rows<Int8Half>, kMostRows, nullptr, 0, f32_panel<Int8Half>, bf16_panel<Int8Half>},
    {f32_rows<Fp8Half>, 8, nullptr, 0, f32_panel<Fp8Half>, bf16_panel<Fp8Half>},
    {f32_rows<Int4Half>, kMostRows, nullptr, 0, f32_panel<Int4Half>, bf16_panel<Int4Half>},
};

}  // namespace mixtral

#endif
