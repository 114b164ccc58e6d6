#include "blocks_avx512.h"
#include "multiply_block.h"

namespace mixtral {

using namespace cpu;

namespace {

#if defined(__x86_64__)
constexpr int64_t kPrefetchBytes = 4096;  // ahead: far enough for memory, near enough for the first cache

// In the order of the tile unit (cpu/amx.h): in each step the even depths, the odd depths, and then both into the sum.
// A pair is used where it was made, in a register: stored, it would not be in the cache yet when a tile is loaded.
template <int kRows, typename Block>
MIXTRAL_TARGET_AVX512_BF16 __attribute__((noinline)) void multiply_rows(const char* data, const float* a, int64_t depth,
                                                                        float* sums) {
  const Block block(data, depth);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 sum[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t step = 0; step < depth / kStepDepth; ++step, a += kStepDepth) {
    const char* ahead = data + step * Block::kStepBytes + kPrefetchBytes;
    for (int64_t byte = 0; byte < Block::kStepBytes; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const auto half = block.half(step, h);
      __m512 even[kRows], odd[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) even[r] = odd[r] = _mm512_setzero_ps();
#pragma GCC unroll 16
      for (int p = 0; p < kHalfPairs; ++p) {
        const __m512i pair = half.pair(p);
        const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          even[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[r * depth + 2 * p]), first, even[r]);
          odd[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[r * depth + 2 * p + 1]), second, odd[r]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][h] = _mm512_add_ps(sum[r][h], _mm512_add_ps(even[r], odd[r]));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(sums + r * kPanelColumns + h * 16, sum[r][h]);
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
void multiply(const char* block, const float* a, int64_t rows, int64_t depth, float* sums) {
  const SubnormalsAreZero mode;  // for the calls: within one function, a compiler may move arithmetic out of it
  if (rows == 1) return multiply_rows<1, Block>(block, a, depth, sums);
  if (rows == 2) return multiply_rows<2, Block>(block, a, depth, sums);
  if (rows == 3) return multiply_rows<3, Block>(block, a, depth, sums);
  return multiply_rows<4, Block>(block, a, depth, sums);
}
#endif

}  // namespace

BlockKernel block_kernel(WeightFormat format) {
#if defined(__x86_64__)
  if (cpu_isa() == CpuIsa::kAmx) {
    if (format == WeightFormat::kPacked) return multiply<Bf16Block>;
    if (format == WeightFormat::kInt8) return multiply<Int8Block>;
    if (format == WeightFormat::kInt4) return multiply<Int4Block>;
  }
#endif
  return nullptr;
}

}  // namespace mixtral
