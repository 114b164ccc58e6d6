#include "blocks_avx512.h"
#include "multiply_row.h"

namespace mixtral {

using namespace cpu;

namespace {

#if defined(__x86_64__)
// In the order of the tile unit (cpu/amx.h): in each step the even depths, the odd depths, and then both into the sum.
// A pair is used where it was made, in a register: stored, it would not be in the cache yet when a tile is loaded.
template <typename Block>
MIXTRAL_TARGET_AVX512_BF16 __attribute__((noinline)) void multiply_steps(const char* data, const float* row,
                                                                         int64_t depth, float* sums) {
  const Block block(data, depth);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t step = 0; step < depth / kStepDepth; ++step, row += kStepDepth) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const auto half = block.half(step, h);
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
#pragma GCC unroll 16
      for (int p = 0; p < kHalfPairs; ++p) {
        const __m512i pair = half.pair(p);
        const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
        even = _mm512_fmadd_ps(_mm512_set1_ps(row[2 * p]), first, even);
        odd = _mm512_fmadd_ps(_mm512_set1_ps(row[2 * p + 1]), second, odd);
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

template <typename Block>
void multiply(const char* block, const float* row, int64_t depth, float* sums) {
  const SubnormalsAreZero mode;  // for the call: within one function, a compiler may move arithmetic out of it
  multiply_steps<Block>(block, row, depth, sums);
}
#endif

}  // namespace

RowKernel row_kernel(WeightFormat format) {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAmx) {
    if (format == WeightFormat::kInt8) return multiply<Int8Block>;
    if (format == WeightFormat::kInt4) return multiply<Int4Block>;
  }
#endif
  return nullptr;
}

}  // namespace mixtral
