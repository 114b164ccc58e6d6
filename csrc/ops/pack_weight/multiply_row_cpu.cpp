#include "../cpu/amx.h"
#include "blocks_avx512.h"
#include "multiply_row.h"

namespace mixtral {

using namespace cpu;

namespace {

#if defined(__x86_64__)
// In the order of the tile unit (cpu/amx.h): in each step the even depths, the odd depths, and then both into the sum.
// Values are used where they were made, in registers.
template <typename Block>
MIXTRAL_TARGET_AVX512_BF16 __attribute__((noinline)) void multiply_steps(const char* data, const float* row,
                                                                         int64_t depth, float* sums) {
  const Block block(data, depth);
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t step = 0; step < depth / kStepDepth; ++step, row += kStepDepth) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const auto half = block.half(step, h);
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
#pragma GCC unroll 16
      for (int p = 0; p < kHalfPairs; ++p) {
        even = _mm512_fmadd_ps(_mm512_set1_ps(row[2 * p]), half.even(p), even);
        odd = _mm512_fmadd_ps(_mm512_set1_ps(row[2 * p + 1]), half.odd(p), odd);
      }
      sum[h] = half.add(_mm512_add_ps(even, odd), sum[h]);
    }
  }
  for (int h = 0; h < 2; ++h) _mm512_storeu_ps(sums + h * 16, sum[h]);
}

// As the tile unit does: subnormal numbers are zero, as operands and as results.
class SubnormalsAreZero {
 public:
  SubnormalsAreZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON | kDenormalsAreZero); }
  ~SubnormalsAreZero() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kDenormalsAreZero = 0x40;
  const unsigned saved_;
};

// A step at a time is made and multiplied, so that weights are fetched while tiles are busy. The sums stay in tiles.
template <typename Block>
MIXTRAL_TARGET_AMX void multiply_few_rows(const char* data, const BFloat16* a, int64_t rows, int64_t depth,
                                          float* sums) {
  alignas(64) BFloat16 steps[4][kStepElements];  // several: a tile is not to wait for its last row, nor that for a tile
  const Block block(data, depth);
  set_tile_rows(rows);
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t s = 0; s < depth / kStepDepth; ++s) {
    BFloat16* values = steps[s % 4];
    for (int64_t h = 0; h < 2; ++h) {
      const auto half = block.half(s, h);
#pragma GCC unroll 16
      for (int p = 0; p < kHalfPairs; ++p) _mm512_store_si512(values + h * kTileElements + p * 32, half.pair(p));
    }
    asm volatile("" : : "r"(values) : "memory");  // GCC's tile loads do not say that they read memory
    _tile_loadd(4, a + s * kStepDepth, depth * sizeof(BFloat16));
    _tile_loadd(6, values, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, values + kTileElements, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, sums, kPanelColumns * sizeof(float));
  _tile_stored(1, sums + 16, kPanelColumns * sizeof(float));
}

template <typename Block>
void multiply(const char* block, const float* row, int64_t depth, float* sums) {
  const SubnormalsAreZero mode;  // for the call: within one function, a compiler may move arithmetic out of it
  multiply_steps<Block>(block, row, depth, sums);
}

// Whether int4 weights give sums that scale by powers of two as real numbers do. Levels are multiples of 2^-8 below 16,
// and powers of scales are 2^-64 to 2^63: where all values of the row are zero or in [2^-47, 2^56), a sum of one step
// is neither subnormal nor infinite, before it is multiplied by its power or after.
bool sums_scale_exactly(const BFloat16* row, int64_t depth) {
  constexpr uint32_t kLeast = (127 - 47) << 7, kEnd = (127 + 56) << 7;
  bool exact = true;
  for_cpu_isa([&] {
    uint32_t outside = 0;
    for (int64_t k = 0; k < depth; ++k) {
      const uint32_t magnitude = row[k].x & 0x7fffu;
      outside |= static_cast<uint32_t>(magnitude != 0 && magnitude - kLeast >= kEnd - kLeast);
    }
    exact = outside == 0;
  });
  return exact;
}
#endif

}  // namespace

RowKernel row_kernel(WeightFormat format, const BFloat16* row, int64_t depth) {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAmx) {
    if (format == WeightFormat::kInt8) return multiply<Int8Block>;
    if (format == WeightFormat::kInt4 && sums_scale_exactly(row, depth)) return multiply<Int4Block>;
  }
#endif
  return nullptr;
}

FewRowsKernel few_rows_kernel(WeightFormat format) {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAmx) {
    if (format == WeightFormat::kInt8) return multiply_few_rows<Int8Block>;
    if (format == WeightFormat::kInt4) return multiply_few_rows<Int4Block>;
  }
#endif
  return nullptr;
}

}  // namespace mixtral
