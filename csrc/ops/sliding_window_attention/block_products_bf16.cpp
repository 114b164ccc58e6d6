// The products of bf16 of block_products.h; the table is in block_products_cpu.cpp.
#include <algorithm>
#include <cstring>

#include "block_products.h"
#include "pack_keys.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mixtral {

#if defined(__x86_64__)
namespace {

using namespace cpu;

// kRows rows and kPanels panels of 32 keys. The sums are those of bf16_kernel().
template <int kRows, int kPanels>
MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE void score_rows_bf16(const BFloat16* q, int64_t width, const BFloat16* panels,
                                                               RowsAhead& ahead, float* scores) {
  constexpr int kVectors = 2 * kPanels;
  for (int64_t begin = 0; begin < width; begin += kChainDepth) {
    __m512 sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
    const int64_t end = std::min(width, begin + kChainDepth);
    for (int64_t d = begin; d < end; d += 2) {
      if (d % (8 / kPanels) == 0) ahead.fetch(1);
      const BFloat16* pairs = panels + panel_index<BFloat16>(0, d);
      __m512bh keys[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        keys[v] = (__m512bh)_mm512_loadu_si512(pairs + v / 2 * kPanelColumns * width + v % 2 * kStepElements / 2);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int32_t two;
        std::memcpy(&two, q + r * width + d, sizeof two);
        const auto pair = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, keys[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = scores + r * kKeyBlock + v * 16;
        const __m512 before = begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
        _mm512_storeu_ps(to, _mm512_add_ps(before, sum[r][v]));
      }
  }
}

template <int kRows>
MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE void score_panels_bf16(const BFloat16* q, int64_t width,
                                                                 const BFloat16* panels, RowsAhead& ahead, int64_t keys,
                                                                 float* scores) {
  if (kRows <= 4 && keys == kKeyBlock)
    return score_rows_bf16 < kRows, kRows <= 4 ? 2 : 1 > (q, width, panels, ahead, scores);
  for (int64_t key = 0; key < keys; key += kPanelColumns)
    score_rows_bf16<kRows, 1>(q, width, panels + key * width, ahead, scores + key);
}

MIXTRAL_TARGET_AVX512_BF16 void score_bf16(const BFloat16* q, int64_t rows, int64_t width, const BFloat16* panels,
                                           RowsAhead& ahead, int64_t keys, float* scores) {
  constexpr int kRows = 12;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    score_panels_bf16<kRows>(q + r * width, width, panels, ahead, keys, scores + r * kKeyBlock);
  for (; r + 4 <= rows; r += 4) score_panels_bf16<4>(q + r * width, width, panels, ahead, keys, scores + r * kKeyBlock);
  q += r * width;
  scores += r * kKeyBlock;
  if (rows - r == 3) score_panels_bf16<3>(q, width, panels, ahead, keys, scores);
  if (rows - r == 2) score_panels_bf16<2>(q, width, panels, ahead, keys, scores);
  if (rows - r == 1) score_panels_bf16<1>(q, width, panels, ahead, keys, scores);
}

// kRows rows and 32 kPanels columns: those from `column` on that fill panels. Returns the first column that is left.
// The values of two neighbouring keys side by side are the pairs that an instruction multiplies. They are put there
// within quarters of the registers; the sums get their order at the end.
template <int kRows, int kPanels>
MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE int64_t add_values_rows_bf16(const BFloat16* weights,
                                                                       const BFloat16* const* values, RowsAhead& ahead,
                                                                       int64_t keys, int64_t column, int64_t width,
                                                                       float* acc) {
  const __m512i left = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0),
                right = _mm512_add_epi32(left, _mm512_set1_epi32(8));
  constexpr int64_t kColumns = kPanels * kPanelColumns;
  for (; column + kColumns <= width; column += kColumns) {
    __m512 sum[kRows][kPanels][2];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) sum[r][p][0] = sum[r][p][1] = _mm512_setzero_ps();
    for (int64_t j = 0; j < keys; j += 2) {
      if (j % (128 / kColumns) == 0) ahead.fetch(1);
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        const __m512i even = _mm512_loadu_si512(values[j] + column + p * kPanelColumns),
                      odd = _mm512_loadu_si512(values[j + 1] + column + p * kPanelColumns);
        const auto low = (__m512bh)_mm512_unpacklo_epi16(even, odd), high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          int32_t two;
          std::memcpy(&two, weights + r * kKeyBlock + j, sizeof two);
          const auto weight = (__m512bh)_mm512_set1_epi32(two);
          sum[r][p][0] = _mm512_dpbf16_ps(sum[r][p][0], weight, low);
          sum[r][p][1] = _mm512_dpbf16_ps(sum[r][p][1], weight, high);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          float* to = acc + r * width + column + p * kPanelColumns + half * 16;
          const __m512 x = _mm512_permutex2var_ps(sum[r][p][0], half == 0 ? left : right, sum[r][p][1]);
          _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), x));
        }
  }
  return column;
}

template <int kRows>
MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE void add_values_panels_bf16(const BFloat16* weights,
                                                                      const BFloat16* const* values, RowsAhead& ahead,
                                                                      int64_t keys, int64_t width, float* acc) {
  int64_t column = 0;
  if (kRows <= 4)
    column = add_values_rows_bf16 < kRows, kRows <= 4 ? 2 : 1 > (weights, values, ahead, keys, 0, width, acc);
  add_values_rows_bf16<kRows, 1>(weights, values, ahead, keys, column, width, acc);
}

MIXTRAL_TARGET_AVX512_BF16 void add_values_bf16(const BFloat16* weights, int64_t rows, const BFloat16* const* values,
                                                RowsAhead& ahead, int64_t keys, int64_t width, float* acc) {
  constexpr int kRows = 12;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    add_values_panels_bf16<kRows>(weights + r * kKeyBlock, values, ahead, keys, width, acc + r * width);
  for (; r + 4 <= rows; r += 4)
    add_values_panels_bf16<4>(weights + r * kKeyBlock, values, ahead, keys, width, acc + r * width);
  weights += r * kKeyBlock;
  acc += r * width;
  if (rows - r == 3) add_values_panels_bf16<3>(weights, values, ahead, keys, width, acc);
  if (rows - r == 2) add_values_panels_bf16<2>(weights, values, ahead, keys, width, acc);
  if (rows - r == 1) add_values_panels_bf16<1>(weights, values, ahead, keys, width, acc);
}

void score_amx(const BFloat16* q, int64_t rows, int64_t width, const BFloat16* panels, RowsAhead& ahead, int64_t keys,
               float* scores) {
  ahead.fetch(keys / 2);
  for (int64_t r = 0; r < rows; ++r) std::fill_n(scores + r * kKeyBlock, keys, 0.0f);
  for (int64_t key = 0; key < keys; key += kPanelColumns)
    bf16_kernel()(q, width, rows, panels + key * width, width, scores + key, kKeyBlock);
}

MIXTRAL_TARGET_AVX512 void add_values_amx(const BFloat16* weights, int64_t rows, const BFloat16* const* values,
                                          RowsAhead& ahead, int64_t keys, int64_t width, float* acc) {
  alignas(64) BFloat16 panel[kKeyBlock * kPanelColumns];
  for (int64_t column = 0; column < width; column += kPanelColumns) {
    pack_values(values, ahead, keys, column, panel);
    bf16_kernel()(weights, kKeyBlock, rows, panel, keys, acc + column, width);
  }
}

}  // namespace
#endif

template <>
BlockProducts<cpu::BFloat16, cpu::BFloat16> block_products() {
#if defined(__x86_64__)
  if (cpu::cpu_isa() == cpu::CpuIsa::kAmx) return {score_amx, add_values_amx};
  return {score_bf16, add_values_bf16};
#else
  return {};
#endif
}

}  // namespace mixtral
