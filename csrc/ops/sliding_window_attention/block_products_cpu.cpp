// clang-format off
// | keys, values | instruction set        | score                                | add_values                            |
// |--------------|------------------------|--------------------------------------|---------------------------------------|
// | f32, f16     | baseline, avx2, others | sums of eight products, in vectors   | one chain over the keys, in vectors   |
// | bf16         | baseline, avx2, avx512 | the same, pairs widened in registers | the same, widened in registers        |
// | bf16         | avx512_bf16            | VDPBF16PS, pairs of values           | VDPBF16PS, pairs of keys              |
// | bf16         | amx                    | bf16_kernel()                        | bf16_kernel() on packed panels        |
// clang-format on
//
// Bound, for a query token with 3 query heads a key head of 128 values, in avx2: a key of one head, 512 bytes with its
// value, costs 96 FMAs on two ports, 32 widenings, 24 shuffles and insertions, and some 10 instructions of the softmax:
// 48 cycles by the FMAs alone. A Zen 5 core takes 80 in the cache: packing the keys, the products and the softmax
// follow
// each other and overlap little. In avx512 it takes 60, in avx512_bf16 50.
#include <type_traits>

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
MIXTRAL_INLINE void score_rows(const float* q, int64_t width, const Stored* panels, RowsAhead& ahead, int64_t keys,
                               float* scores) {
  using Float = typename VectorTypes<kBytes>::Float;
  using Word = typename VectorTypes<kBytes>::Word;
  constexpr int64_t kLanes = VectorTypes<kBytes>::kLanes;
  for (int64_t key = 0; key < keys; key += 2 * kLanes) {
    const Stored* panel = panels + key / kPanelColumns * kPanelColumns * width;
    const Stored* columns[2];
    for (int64_t v = 0; v < 2; ++v) columns[v] = panel + panel_index<Stored>(key % kPanelColumns + v * kLanes, 0);
    for (int64_t d = 0; d < width; d += 8) {
      if (d % (128 / kLanes) == 0) ahead.fetch(1);
      Float sum[kRows][2] = {};
      const int64_t first = panel_index<Stored>(0, d);
#pragma GCC unroll 8
      for (int64_t i = 0; i < 8; i += kWordValues<Stored>) {
        Float values[2][2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v)
          widen<kBytes, Stored>(*reinterpret_cast<const Word*>(columns[v] + first + panel_index<Stored>(0, i)),
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
        auto* to = reinterpret_cast<Float*>(scores + r * kKeyBlock + key);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) to[v] = (d == 0 ? Float{} : to[v]) + sum[r][v];
      }
    }
  }
}

// From (even columns, odd columns) to (first half, second half).
template <int kBytes>
MIXTRAL_INLINE void interleave(typename VectorTypes<kBytes>::Float& even, typename VectorTypes<kBytes>::Float& odd) {
  constexpr int64_t kLanes = VectorTypes<kBytes>::kLanes;
  typename VectorTypes<kBytes>::Word first, second;
  for (int64_t j = 0; j < kLanes; ++j) {
    first[j] = static_cast<uint32_t>(j / 2 + j % 2 * kLanes);
    second[j] = static_cast<uint32_t>(first[j] + kLanes / 2);
  }
  const typename VectorTypes<kBytes>::Float x = even, y = odd;
  even = __builtin_shuffle(x, y, first);
  odd = __builtin_shuffle(x, y, second);
}

// What computes or uses x is not moved across this by the compiler.
template <typename T>
MIXTRAL_INLINE void stay(T& x) {
#if defined(__x86_64__)
  if constexpr (std::is_pointer_v<T>) {
    asm volatile("" : "+r"(x));
  } else {
    asm volatile("" : "+v"(x));
  }
#else
  (void)x;
#endif
}

// kRows rows and kVectors vectors of columns. One chain over the keys. Returns the first column that is left.
template <int kBytes, int kRows, int kVectors, typename Stored>
MIXTRAL_INLINE int64_t add_values_columns(const float* weights, const Stored* const* values, RowsAhead& ahead,
                                          int64_t keys, int64_t column, int64_t width, float* acc) {
  using Float = typename VectorTypes<kBytes>::Float;
  using Word = typename VectorTypes<kBytes>::Word;
  constexpr int64_t kLanes = VectorTypes<kBytes>::kLanes, kColumns = kVectors * kLanes;
  constexpr int kWordVectors = kWordValues<Stored>;  // vectors of values that a vector of words holds
  for (; column + kColumns <= width; column += kColumns) {
    Float sum[kRows][kVectors] = {};
    for (int64_t j = 0; j < keys; ++j) {
      if (j % (128 / kColumns) == 0) ahead.fetch(1);
      const auto* words = reinterpret_cast<const Word*>(values[j] + column);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v += kWordVectors) {
        Float value[2];
        widen<kBytes, Stored>(words[v / kWordVectors], value[0], value[1]);
        const float* weight = weights + j;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r, weight += kKeyBlock) {
          stay(weight);  // loaded where it is used: there is no register to keep one in
#pragma GCC unroll 2
          for (int of_word = 0; of_word < kWordVectors; ++of_word) sum[r][v + of_word] += *weight * value[of_word];
          stay(sum[r][v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kWordVectors == 2)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v += 2) interleave<kBytes>(sum[r][v], sum[r][v + 1]);
      auto* to = reinterpret_cast<Float*>(acc + r * width + column);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) to[v] += sum[r][v];
    }
  }
  return column;
}

// Calls body(r, count) for rows r to r + count - 1: kRows at a time, as many as the registers hold, then fewer.
template <int kRows, typename F>
MIXTRAL_INLINE void for_rows(int64_t rows, const F& body) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) body(r, std::integral_constant<int, kRows>());
  for (; r + 4 <= rows; r += 4) body(r, std::integral_constant<int, 4>());
  if (r + 3 == rows) return body(r, std::integral_constant<int, 3>());
  if (r + 2 == rows) return body(r, std::integral_constant<int, 2>());
  if (r + 1 == rows) return body(r, std::integral_constant<int, 1>());
}

template <int kBytes, int kRows, typename Stored>
MIXTRAL_INLINE void score(const float* q, int64_t rows, int64_t width, const Stored* panels, RowsAhead& ahead,
                          int64_t keys, float* scores) {
  for_rows<kRows>(
      rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
        score_rows<kBytes, count>(q + r * width, width, panels, ahead, keys, scores + r * kKeyBlock);
      });
}

// kVectors: so many of three rows or fewer fit in the registers, and hide the latency of a multiply-add.
template <int kBytes, int kRows, int kVectors, typename Stored>
MIXTRAL_INLINE void add_values(const float* weights, int64_t rows, const Stored* const* values, RowsAhead& ahead,
                               int64_t keys, int64_t width, float* acc) {
  for_rows<kRows>(
      rows, [&](int64_t r, auto count) __attribute__((always_inline)) {
        const auto add = [&](int64_t column, auto vectors) __attribute__((always_inline)) {
          return add_values_columns<kBytes, count, vectors>(weights + r * kKeyBlock, values, ahead, keys, column, width,
                                                            acc + r * width);
        };
        const int64_t column = count <= 3 ? add(0, std::integral_constant < int, count <= 3 ? kVectors : 2 > ()) : 0;
        add(column, std::integral_constant<int, 2>());
      });
}

template <typename Stored>
void score_baseline(const float* q, int64_t rows, int64_t width, const Stored* panels, RowsAhead& ahead, int64_t keys,
                    float* scores) {
  score<16, 4>(q, rows, width, panels, ahead, keys, scores);
}

template <typename Stored>
void add_values_baseline(const float* weights, int64_t rows, const Stored* const* values, RowsAhead& ahead,
                         int64_t keys, int64_t width, float* acc) {
  add_values<16, 4, 2>(weights, rows, values, ahead, keys, width, acc);
}

#if defined(__x86_64__)
template <typename Stored>
MIXTRAL_TARGET_AVX2 void score_avx2(const float* q, int64_t rows, int64_t width, const Stored* panels, RowsAhead& ahead,
                                    int64_t keys, float* scores) {
  score<32, 6>(q, rows, width, panels, ahead, keys, scores);
}

template <typename Stored>
MIXTRAL_TARGET_AVX2 void add_values_avx2(const float* weights, int64_t rows, const Stored* const* values,
                                         RowsAhead& ahead, int64_t keys, int64_t width, float* acc) {
  add_values<32, 6, 4>(weights, rows, values, ahead, keys, width, acc);
}

template <typename Stored>
MIXTRAL_TARGET_AVX512 void score_avx512(const float* q, int64_t rows, int64_t width, const Stored* panels,
                                        RowsAhead& ahead, int64_t keys, float* scores) {
  score<64, 12>(q, rows, width, panels, ahead, keys, scores);
}

template <typename Stored>
MIXTRAL_TARGET_AVX512 void add_values_avx512(const float* weights, int64_t rows, const Stored* const* values,
                                             RowsAhead& ahead, int64_t keys, int64_t width, float* acc) {
  add_values<64, 12, 4>(weights, rows, values, ahead, keys, width, acc);
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

}  // namespace mixtral
