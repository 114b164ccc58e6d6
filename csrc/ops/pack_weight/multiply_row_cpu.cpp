#include "../cpu/amx.h"
#include "blocks_avx512.h"
#include "multiply_row.h"

namespace mixtral {

using namespace cpu;

namespace {

#if defined(__x86_64__)
// In the order of the tile unit (cpu/amx.h): in each step the even depths, the odd depths, and then both into the sum.
// Values are used in the registers where they were made.
MIXTRAL_TARGET_AVX512_BF16 __attribute__((noinline)) void multiply_steps(const Int8Block& block, const float* row,
                                                                         int64_t depth, float* sums) {
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
      sum[h] = _mm512_add_ps(sum[h], _mm512_add_ps(even, odd));
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

void multiply_row(const char* block, const float* row, int64_t depth, float* sums) {
  const SubnormalsAreZero mode;  // for the call: within one function, a compiler may move arithmetic out of it
  multiply_steps({block}, row, depth, sums);
}

// One step is multiplied while the values of the next are made: a tile load waits until its values have left the store
// buffer. The sums stay in tiles.
template <typename Block>
MIXTRAL_TARGET_AMX void multiply_few_rows(const char* data, const BFloat16* a, int64_t rows, int64_t depth,
                                          float* sums) {
  alignas(64) BFloat16 made[4][kStepElements];  // several, so that making values does not wait for a tile load
  const Block block{data};
  const int64_t steps = depth / kStepDepth;
  set_tile_rows(rows);
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t next = 0; next <= steps; ++next) {
    if (next < steps)
      for (int64_t h = 0; h < 2; ++h) block.half(next, h).store(made[next % 4] + h * kTileElements);
    if (next == 0) continue;
    const BFloat16* values = made[(next - 1) % 4];
    asm volatile("" : : "r"(values) : "memory");  // GCC's tile loads do not say that they read memory
    _tile_loadd(4, a + (next - 1) * kStepDepth, depth * sizeof(BFloat16));
    _tile_loadd(6, values, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, values + kTileElements, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, sums, kPanelColumns * sizeof(float));
  _tile_stored(1, sums + 16, kPanelColumns * sizeof(float));
}
#endif

}  // namespace

RowKernel row_kernel(WeightFormat format) {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAmx && format == WeightFormat::kInt8) return multiply_row;
#endif
  (void)format;
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
