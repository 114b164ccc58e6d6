// | keys, values | instruction set        | score                                | add_values |
// |--------------|------------------------|--------------------------------------|-------------------------------------|
// | f32, f16     | baseline, avx2, others | sums of eight products, in vectors   | one chain over the keys, in vectors
// | | bf16         | baseline, avx2, avx512 | the same, pairs widened in registers | the same, widened in registers |
// | bf16         | avx512_bf16            | bf16_kernel()                        | VDPBF16PS, pairs of keys | | bf16 |
// amx                    | bf16_kernel()                        | bf16_kernel() on a packed panel     |
//
// Bound, for a query token of Mixtral (4 query heads a key head of 128 values) in avx2: a key costs 2 x 64 FMAs, 8
// additions, 32 widenings, 24 shuffles and insertions and some 25 instructions of the softmax. The FMAs alone take 64
// cycles for its 512 bytes. A Zen 5 core takes 115 in the cache: add_values has eight sums in flight, no more than the
// latency of an FMA asks for.
#include "block_products.h"
#include "pack_keys.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mixtral {
namespace {

using namespace cpu;

// ---- f32 products, in plain vectors of the compiler

template <int kBytes>
struct VectorTypes {
  static constexpr int64_t kLanes = kBytes / sizeof(float);
  typedef float Float __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef uint32_t Word __attribute__((vector_size(kBytes), aligned(4), may_alias));
};

// Values of a word: one f32, or two bf16, the first in the lower half.
template <typename Stored>
inline constexpr int64_t kWordValues = sizeof(float) / sizeof(Stored);

// The first and the second value of each word; of f32 there is only one.
template <int kBytes, typename Stored>
MIXTRAL_INLINE void widen(const typename VectorTypes<kBytes>::Word& words, typename VectorTypes<kBytes>::Float& first,
                          typename VectorTypes<kBytes>::Float& second) {
  using Float = typename VectorTypes<kBytes>::Float;
  if constexpr (kWordValues<Stored> == 1) {
    first = (Float)words;
  } else {
    first = (Float)(words << 16);
    second = (Float)(words & 0xffff0000u);
  }
}

// kRows rows and two vectors of keys. Sums of eight products, added up in order.
template <int kBytes, int kRows, typename Stored>
MIXTRAL_INLINE void score_rows(const float* q, int64_t width, const Stored* panel, float* scores) {
  using Float = typename VectorTypes<kBytes>::Float;
  using Word = typename VectorTypes<kBytes>::Word;
  constexpr int64_t kLanes = VectorTypes<kBytes>::kLanes;
  for (int64_t column = 0; column < kPanelColumns; column += 2 * kLanes) {
    const Stored* keys[2] = {panel + panel_index<Stored>(column, 0), panel + panel_index<Stored>(column + kLanes, 0)};
    for (int64_t d = 0; d < width; d += 8) {
      Float sum[kRows][2] = {};
      const int64_t first = panel_index<Stored>(0, d);
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; i += kWordValues<Stored>) {
        Float values[2][2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
          widen<kBytes, Stored>(*reinterpret_cast<const Word*>(keys[v] + first + panel_index<Stored>(0, i)),
                                values[0][v], values[1][v]);
#pragma GCC unroll 2
        for (int64_t of_word = 0; of_word < kWordValues<Stored>; ++of_word)
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) sum[r][v] += q[r * width + d + i + of_word] * values[of_word][v];
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        auto* to = reinterpret_cast<Float*>(scores + r * kKeyBlock + column);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) to[v] = (d == 0 ? Float{} : to[v]) + sum[r][v];
      }
    }
  }
}

// From (even columns, odd columns) to (first half, second half).
template <int kBytes>
MIXTRAL_INLINE void interleave(typename VectorTypes<kBytes>::Float (&x)[2]) {
  constexpr int64_t kLanes = VectorTypes<kBytes>::kLanes;
  typename VectorTypes<kBytes>::Word first, second;
  for (int64_t j = 0; j < kLanes; ++j) {
    first[j] = static_cast<uint32_t>(j / 2 + j % 2 * kLanes);
    second[j] = static_cast<uint32_t>(first[j] + kLanes / 2);
  }
  const typename VectorTypes<kBytes>::Float even = x[0], odd = x[1];
  x[0] = __builtin_shuffle(even, odd, first);
  x[1] = __builtin_shuffle(even, odd, second);
}

// kRows rows and two vectors of columns. One chain over the keys.
template <int kBytes, int kRows, typename Stored>
MIXTRAL_INLINE void add_values_rows(const float* weights, const Stored* const* values, RowsAhead& ahead, int64_t keys,
                                    int64_t d, int64_t width, float* acc) {
  using Float = typename VectorTypes<kBytes>::Float;
  using Word = typename VectorTypes<kBytes>::Word;
  constexpr int64_t kLanes = VectorTypes<kBytes>::kLanes;
  for (int64_t column = 0; column < kPanelColumns; column += 2 * kLanes) {
    Float sum[kRows][2] = {};
    for (int64_t j = 0; j < keys; ++j) {
      if (j % (64 / kLanes) == 0) ahead.fetch(1);
      const auto* words = reinterpret_cast<const Word*>(values[j] + d + column);
      Float value[2];
      widen<kBytes, Stored>(words[0], value[0], value[1]);
      if constexpr (kWordValues<Stored> == 1) value[1] = (Float)words[1];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sum[r][v] += weights[r * kKeyBlock + j] * value[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kWordValues<Stored> == 2) interleave<kBytes>(sum[r]);
      auto* to = reinterpret_cast<Float*>(acc + r * width + column);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) to[v] += sum[r][v];
    }
  }
}

// Calls body(r, count) for rows r to r + count - 1: kRows at a time, as many as the registers hold, then fewer.
template <int kRows, typename F>
MIXTRAL_INLINE void for_rows(int64_t rows, const F& body) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) body(r, std::integral_constant<int, kRows>());
  for (; r + 4 <= rows; r += 4) body(r, std::integral_constant<int, 4>());
  for (; r + 2 <= rows; r += 2) body(r, std::integral_constant<int, 2>());
  if (r < rows) body(r, std::integral_constant<int, 1>());
}

template <int kBytes, int kRows, typename Stored>
MIXTRAL_INLINE void score(const float* q, int64_t rows, int64_t width, const Stored* panel, float* scores) {
  for_rows<kRows>(
      rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
        score_rows<kBytes, count>(q + r * width, width, panel, scores + r * kKeyBlock);
      });
}

template <int kBytes, int kRows, typename Stored>
MIXTRAL_INLINE void add_values(const float* weights, int64_t rows, const Stored* const* values, RowsAhead& ahead,
                               int64_t keys, int64_t d, int64_t width, float* acc) {
  for_rows<kRows>(
      rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
        add_values_rows<kBytes, count>(weights + r * kKeyBlock, values, ahead, keys, d, width, acc + r * width);
      });
}

template <typename Stored>
void score_baseline(const float* q, int64_t rows, int64_t width, const Stored* panel, float* scores) {
  score<16, 4>(q, rows, width, panel, scores);
}

template <typename Stored>
void add_values_baseline(const float* weights, int64_t rows, const Stored* const* values, RowsAhead& ahead,
                         int64_t keys, int64_t d, int64_t width, float* acc) {
  add_values<16, 4>(weights, rows, values, ahead, keys, d, width, acc);
}

#if defined(__x86_64__)
template <typename Stored>
MIXTRAL_TARGET_AVX2 void score_avx2(const float* q, int64_t rows, int64_t width, const Stored* panel, float* scores) {
  score<32, 6>(q, rows, width, panel, scores);
}

template <typename Stored>
MIXTRAL_TARGET_AVX2 void add_values_avx2(const float* weights, int64_t rows, const Stored* const* values,
                                         RowsAhead& ahead, int64_t keys, int64_t d, int64_t width, float* acc) {
  add_values<32, 6>(weights, rows, values, ahead, keys, d, width, acc);
}

template <typename Stored>
MIXTRAL_TARGET_AVX512 void score_avx512(const float* q, int64_t rows, int64_t width, const Stored* panel,
                                        float* scores) {
  score<64, 12>(q, rows, width, panel, scores);
}

template <typename Stored>
MIXTRAL_TARGET_AVX512 void add_values_avx512(const float* weights, int64_t rows, const Stored* const* values,
                                             RowsAhead& ahead, int64_t keys, int64_t d, int64_t width, float* acc) {
  add_values<64, 12>(weights, rows, values, ahead, keys, d, width, acc);
}

// ---- bf16 products

void score_bf16(const BFloat16* q, int64_t rows, int64_t width, const BFloat16* panel, float* scores) {
  for (int64_t r = 0; r < rows; ++r) std::fill_n(scores + r * kKeyBlock, kPanelColumns, 0.0f);
  bf16_kernel()(q, width, rows, panel, width, scores, kKeyBlock);
}

// The values of two neighbouring keys side by side are the pairs that an instruction multiplies.
template <int kRows>
MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE void add_values_rows_bf16(const BFloat16* weights,
                                                                    const BFloat16* const* values, RowsAhead& ahead,
                                                                    int64_t keys, int64_t d, int64_t width,
                                                                    float* acc) {
  const __m512i columns = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper_columns = _mm512_add_epi16(columns, _mm512_set1_epi16(16));
  __m512 sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t j = 0; j < keys; j += 2) {
    if (j % 4 == 0) ahead.fetch(1);
    const __m512i even = _mm512_loadu_si512(values[j] + d), odd = _mm512_loadu_si512(values[j + 1] + d);
    const auto left = (__m512bh)_mm512_permutex2var_epi16(even, columns, odd);
    const auto right = (__m512bh)_mm512_permutex2var_epi16(even, upper_columns, odd);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      int32_t two;
      std::memcpy(&two, weights + r * kKeyBlock + j, sizeof two);
      const auto weight = (__m512bh)_mm512_set1_epi32(two);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], weight, left);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], weight, right);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    for (int half = 0; half < 2; ++half) {
      float* to = acc + r * width + half * 16;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[r][half]));
    }
}

MIXTRAL_TARGET_AVX512_BF16 void add_values_bf16(const BFloat16* weights, int64_t rows, const BFloat16* const* values,
                                                RowsAhead& ahead, int64_t keys, int64_t d, int64_t width, float* acc) {
  constexpr int kRows = 12;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    add_values_rows_bf16<kRows>(weights + r * kKeyBlock, values, ahead, keys, d, width, acc + r * width);
  for (; r + 4 <= rows; r += 4)
    add_values_rows_bf16<4>(weights + r * kKeyBlock, values, ahead, keys, d, width, acc + r * width);
  for (; r < rows; ++r)
    add_values_rows_bf16<1>(weights + r * kKeyBlock, values, ahead, keys, d, width, acc + r * width);
}

MIXTRAL_TARGET_AVX512 void add_values_amx(const BFloat16* weights, int64_t rows, const BFloat16* const* values,
                                          RowsAhead& ahead, int64_t keys, int64_t d, int64_t width, float* acc) {
  alignas(64) BFloat16 panel[kKeyBlock * kPanelColumns];
  pack_values(values, ahead, keys, d, panel);
  bf16_kernel()(weights, kKeyBlock, rows, panel, keys, acc, width);
}
#endif

template <typename Stored>
BlockProducts<Stored, float> f32_products() {
#if defined(__x86_64__)
  if (cpu_isa() >= CpuIsa::kAvx512) return {score_avx512<Stored>, add_values_avx512<Stored>};
  if (cpu_isa() == CpuIsa::kAvx2) return {score_avx2<Stored>, add_values_avx2<Stored>};
#endif
  return {score_baseline<Stored>, add_values_baseline<Stored>};
}

}  // namespace

template <>
BlockProducts<float, float> block_products() {
  return f32_products<float>();
}

template <>
BlockProducts<BFloat16, float> block_products() {
  return f32_products<BFloat16>();
}

template <>
BlockProducts<BFloat16, BFloat16> block_products() {
#if defined(__x86_64__)
  return {score_bf16, cpu_isa() == CpuIsa::kAmx ? add_values_amx : add_values_bf16};
#else
  return {};
#endif
}

}  // namespace mixtral
