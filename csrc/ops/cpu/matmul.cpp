#include "matmul.h"

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "isa.h"
#include "prefetch.h"

namespace mixtral::cpu {
namespace {

// ---- f32, in plain vectors of the compiler

template <int kBytes>
struct VectorOf {
  typedef float Type __attribute__((vector_size(kBytes), aligned(4), may_alias));
};

// kRows rows times kVectors vectors of columns stay in registers.
template <bool kAhead, int kBytes, int kRows, int kVectors>
MIXTRAL_INLINE void multiply_rows_f32(const float* a, int64_t lda, const float* panel, int64_t depth, float* c,
                                      int64_t ldc) {
  using Vector = typename VectorOf<kBytes>::Type;
  constexpr int kLanes = kBytes / static_cast<int>(sizeof(float));
  for (int64_t column = 0; column < kPanelColumns; column += kVectors * kLanes) {
    for (int64_t begin = 0; begin < depth; begin += kChainDepth) {
      Vector sum[kRows][kVectors] = {};
      const int64_t end = std::min(depth, begin + kChainDepth);
      for (int64_t k = begin; k < end; ++k) {
        if constexpr (kAhead && kBytes == 64) prefetch_ahead<kVectors * kBytes>(panel + k * kPanelColumns + column);
        if constexpr (kAhead && kBytes < 64) prefetch_ahead_once<kVectors * kBytes>(panel + k * kPanelColumns + column);
        const Vector* b = reinterpret_cast<const Vector*>(panel + k * kPanelColumns + column);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r * lda + k] * b[v];
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(c + r * ldc + column + v * kLanes) += sum[r][v];
    }
  }
}

template <bool kAhead, int kBytes, int kRows, int kVectors>
MIXTRAL_INLINE void multiply_f32(const float* a, int64_t lda, int64_t rows, const float* panel, int64_t depth, float* c,
                                 int64_t ldc) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    multiply_rows_f32<kAhead, kBytes, kRows, kVectors>(a + r * lda, lda, panel, depth, c + r * ldc, ldc);
  for (; r + 4 <= rows; r += 4)
    multiply_rows_f32<kAhead, kBytes, 4, kVectors>(a + r * lda, lda, panel, depth, c + r * ldc, ldc);
  for (; r < rows; ++r)
    multiply_rows_f32<kAhead, kBytes, 1, kVectors>(a + r * lda, lda, panel, depth, c + r * ldc, ldc);
}

template <bool kAhead>
void multiply_f32_baseline(const float* a, int64_t lda, int64_t rows, const float* panel, int64_t depth, float* c,
                           int64_t ldc) {
  multiply_f32<kAhead, 16, 6, 2>(a, lda, rows, panel, depth, c, ldc);
}

#if defined(__x86_64__)
template <bool kAhead>
MIXTRAL_TARGET_AVX2 void multiply_f32_avx2(const float* a, int64_t lda, int64_t rows, const float* panel, int64_t depth,
                                           float* c, int64_t ldc) {
  multiply_f32<kAhead, 32, 6, 2>(a, lda, rows, panel, depth, c, ldc);
}

template <bool kAhead>
MIXTRAL_TARGET_AVX512 void multiply_f32_avx512(const float* a, int64_t lda, int64_t rows, const float* panel,
                                               int64_t depth, float* c, int64_t ldc) {
  multiply_f32<kAhead, 64, 12, 2>(a, lda, rows, panel, depth, c, ldc);
}

// ---- bf16 in AVX-512: each instruction adds the products of a pair to sixteen sums

template <bool kAhead, int kRows>
MIXTRAL_TARGET_AVX512_BF16 MIXTRAL_INLINE void multiply_rows_bf16(const BFloat16* a, int64_t lda, const BFloat16* panel,
                                                                  int64_t depth, float* c, int64_t ldc) {
  for (int64_t begin = 0; begin < depth; begin += kChainDepth) {
    __m512 sum[kRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    const int64_t end = std::min(depth, begin + kChainDepth);
    for (int64_t k = begin; k < end; k += kStepDepth) {
      const BFloat16* b = panel + k * kPanelColumns;
      if constexpr (kAhead) prefetch_ahead<kStepElements * sizeof(BFloat16)>(b);
      for (int64_t pair = 0; pair < kStepDepth / 2; ++pair) {
        const auto left = (__m512bh)_mm512_loadu_si512(b + pair * kStepDepth);
        const auto right = (__m512bh)_mm512_loadu_si512(b + kTileElements + pair * kStepDepth);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          int32_t two;
          std::memcpy(&two, a + r * lda + k + 2 * pair, sizeof two);
          const auto row = (__m512bh)_mm512_set1_epi32(two);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], row, left);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], row, right);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half) {
        float* to = c + r * ldc + half * 16;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[r][half]));
      }
  }
}

template <bool kAhead>
MIXTRAL_TARGET_AVX512_BF16 void multiply_bf16_avx512(const BFloat16* a, int64_t lda, int64_t rows,
                                                     const BFloat16* panel, int64_t depth, float* c, int64_t ldc) {
  constexpr int kRows = 12;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    multiply_rows_bf16<kAhead, kRows>(a + r * lda, lda, panel, depth, c + r * ldc, ldc);
  for (; r + 4 <= rows; r += 4) multiply_rows_bf16<kAhead, 4>(a + r * lda, lda, panel, depth, c + r * ldc, ldc);
  for (; r < rows; ++r) multiply_rows_bf16<kAhead, 1>(a + r * lda, lda, panel, depth, c + r * ldc, ldc);
}

// ---- bf16 in AMX

// The rows for which the tile registers of this thread are configured. Configuring costs about ten tile products.
struct TileShape {
  int64_t upper = 0, lower = 0;
};
thread_local TileShape tile_shape;

MIXTRAL_TARGET_AMX MIXTRAL_INLINE void set_tile_shape(const TileShape& shape) {
  if (shape.upper == tile_shape.upper && shape.lower == tile_shape.lower) return;
  configure_tiles(shape.upper, shape.lower);
  tile_shape = shape;
}

// Up to 32 rows; kLower: more than 16. The sums stay in C's tiles over the whole depth.
template <bool kAhead, bool kLower>
MIXTRAL_TARGET_AMX MIXTRAL_INLINE void multiply_tiles(const BFloat16* a, int64_t lda, const BFloat16* panel,
                                                      int64_t depth, float* c, int64_t ldc) {
  const int64_t a_bytes = lda * static_cast<int64_t>(sizeof(BFloat16)),
                c_bytes = ldc * static_cast<int64_t>(sizeof(float));
  _tile_loadd(0, c, c_bytes);
  _tile_loadd(1, c + 16, c_bytes);
  if constexpr (kLower) {
    _tile_loadd(2, c + 16 * ldc, c_bytes);
    _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  }
  for (int64_t k = 0; k < depth; k += kStepDepth) {
    const BFloat16* b = panel + k * kPanelColumns;
    if constexpr (kAhead) prefetch_ahead<kStepElements * sizeof(BFloat16)>(b);
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTileElements, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kLower) {
      _tile_loadd(5, a + 16 * lda + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  if constexpr (kLower) {
    _tile_stored(2, c + 16 * ldc, c_bytes);
    _tile_stored(3, c + 16 * ldc + 16, c_bytes);
  }
}

template <bool kAhead>
MIXTRAL_TARGET_AMX void multiply_bf16_amx(const BFloat16* a, int64_t lda, int64_t rows, const BFloat16* panel,
                                          int64_t depth, float* c, int64_t ldc) {
  for (int64_t r = 0; r < rows; r += 2 * kTileRows) {
    const TileShape shape{std::min(kTileRows, rows - r), std::clamp(rows - r - kTileRows, int64_t{0}, kTileRows)};
    set_tile_shape(shape);
    if (shape.lower > 0) {
      multiply_tiles<kAhead, true>(a + r * lda, lda, panel, depth, c + r * ldc, ldc);
    } else {
      multiply_tiles<kAhead, false>(a + r * lda, lda, panel, depth, c + r * ldc, ldc);
    }
  }
}

template <bool kPrefetch>
MIXTRAL_TARGET_AMX MIXTRAL_INLINE void multiply_tile_rows(const BFloat16* tiles, int64_t rows, const BFloat16* panel,
                                                          int64_t depth, float* c, const BFloat16* next) {
  constexpr int64_t kRowBytes = kPanelColumns * sizeof(float), kLineElements = 64 / sizeof(BFloat16);
  const int64_t lower = kTileRows * depth;  // from one group of sixteen rows to the next
  const int64_t blocks = ceil_div(rows, 2 * kTileRows);
  const int64_t share = ceil_div(kStepElements, blocks);  // each block fetches its share of each step of `next`
  for (int64_t i = 0; i < blocks; ++i, tiles += 2 * lower, c += 2 * kTileRows * kPanelColumns) {
    float* c_lower = c + kTileRows * kPanelColumns;
    _tile_loadd(0, c, kRowBytes);
    _tile_loadd(1, c + 16, kRowBytes);
    _tile_loadd(2, c_lower, kRowBytes);
    _tile_loadd(3, c_lower + 16, kRowBytes);
    for (int64_t k = 0; k < depth; k += kStepDepth) {
      if constexpr (kPrefetch)
        for (int64_t e = 0; e < share; e += kLineElements)
          _mm_prefetch(next + k * kPanelColumns + i * share + e, _MM_HINT_T1);
      const BFloat16 *a = tiles + k * kTileRows, *b = panel + k * kPanelColumns;
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + kTileElements, 64);
      _tile_loadd(4, a, 64);
      _tile_loadd(5, a + lower, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, kRowBytes);
    _tile_stored(1, c + 16, kRowBytes);
    _tile_stored(2, c_lower, kRowBytes);
    _tile_stored(3, c_lower + 16, kRowBytes);
  }
}

MIXTRAL_TARGET_AMX void multiply_tiles_amx(const BFloat16* tiles, int64_t rows, const BFloat16* panel, int64_t depth,
                                           float* c, const BFloat16* next) {
  set_tile_shape({kTileRows, kTileRows});
  if (next) {
    multiply_tile_rows<true>(tiles, rows, panel, depth, c, next);
  } else {
    multiply_tile_rows<false>(tiles, rows, panel, depth, c, next);
  }
}

MIXTRAL_TARGET_AMX void release_amx_tiles() {
  _tile_release();
  tile_shape = {};
}
#endif

}  // namespace

MicroKernel<float> f32_kernel(bool ahead) {
#if defined(__x86_64__)
  if (cpu_isa() >= CpuIsa::kAvx512) return ahead ? multiply_f32_avx512<true> : multiply_f32_avx512<false>;
  if (cpu_isa() == CpuIsa::kAvx2) return ahead ? multiply_f32_avx2<true> : multiply_f32_avx2<false>;
#endif
  return ahead ? multiply_f32_baseline<true> : multiply_f32_baseline<false>;
}

MicroKernel<BFloat16> bf16_kernel(bool ahead) {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAmx) return ahead ? multiply_bf16_amx<true> : multiply_bf16_amx<false>;
  if (cpu_isa() == CpuIsa::kAvx512Bf16) return ahead ? multiply_bf16_avx512<true> : multiply_bf16_avx512<false>;
#endif
  (void)ahead;
  return nullptr;
}

TileKernel tile_kernel() {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAmx) return multiply_tiles_amx;
#endif
  return nullptr;
}

#if defined(__x86_64__)
MIXTRAL_TARGET_AMX void set_tile_rows(int64_t rows) { set_tile_shape({rows, 0}); }
#endif

void release_tiles() {
#if defined(__x86_64__)
  if (tile_shape.upper > 0) release_amx_tiles();
#endif
}

}  // namespace mixtral::cpu
