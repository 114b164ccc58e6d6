// Weights are decoded by AVX-512 and multiplied by the tile unit. One row of int8 is multiplied by AVX-512 in the tile
// unit's order: to decode into memory would take longer.
#include "../cpu/amx.h"
#include "../cpu/matmul.h"
#include "blocks_avx512.h"
#include "weight_kernels.h"

#if defined(__x86_64__)

namespace mixtral {

using namespace cpu;

namespace {

using namespace avx512;

// In each step the even depths, the odd depths, and then both into the sum (cpu/amx.h). Values are used in the
// registers where they were made.
MIXTRAL_TARGET_AVX512_BF16 __attribute__((noinline)) void multiply_steps(const char* block, const float* row,
                                                                         int64_t depth, float* sums) {
  Int8Half halves[2] = {{block, depth, 0, 0}, {block, depth, 0, 1}};
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t k = 0; k < depth; k += kStepDepth, row += kStepDepth) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      halves[h].begin_step();
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        const Pairs pairs = halves[h].pairs(g);
        const float* at = row + g * 2 * kGroupPairs;
#pragma GCC unroll 4
        for (int p = 0; p < kGroupPairs; ++p, at += 2) {
          even = _mm512_fmadd_ps(_mm512_set1_ps(at[0]), Int8Half::even(pairs.pair[p]), even);
          odd = _mm512_fmadd_ps(_mm512_set1_ps(at[1]), Int8Half::odd(pairs.pair[p]), odd);
        }
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

void int8_row(const char* const* blocks, int64_t count, const float* row, int64_t, int64_t depth, float* sums) {
  const SubnormalsAreZero mode;  // for the calls: within one function, a compiler may move arithmetic out of it
  for (int64_t i = 0; i < count; ++i) multiply_steps(blocks[i], row, depth, sums + i * kPanelColumns);
}

// One step is multiplied while the values of the next are made: a tile load waits until its values have left the store
// buffer. The sums stay in tiles.
template <typename Half>
MIXTRAL_TARGET_AMX void multiply_rows(const char* block, const BFloat16* a, int64_t rows, int64_t depth, float* sums) {
  alignas(64) BFloat16 made[4][kStepElements];  // several, so that making values does not wait for a tile load
  Half halves[2] = {{block, depth, 0, 0}, {block, depth, 0, 1}};
  const int64_t steps = depth / kStepDepth;
  set_tile_rows(rows);
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t next = 0; next <= steps; ++next) {
    if (next < steps)
      for (int h = 0; h < 2; ++h) store_step(halves[h], made[next % 4] + h * kTileElements);
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

template <typename Half>
void bf16_rows(const char* const* blocks, int64_t count, const BFloat16* a, int64_t rows, int64_t depth, float* sums) {
  for (int64_t i = 0; i < count; ++i) multiply_rows<Half>(blocks[i], a, rows, depth, sums + i * rows * kPanelColumns);
}

}  // namespace

const WeightKernels kAmxWeightKernels[kPackedFormats] = {
    {nullptr, 0, nullptr, 0, nullptr, nullptr},  // bf16: in place, by the micro-kernel
    {int8_row, 1, bf16_rows<Int8Half>, kTileRows, nullptr, bf16_panel<Int8Half>},
    {nullptr, 0, nullptr, 0, nullptr, bf16_panel<Fp8Half>},
    {nullptr, 0, bf16_rows<Int4Half>, kTileRows, nullptr, bf16_panel<Int4Half>},
};

}  // namespace mixtral

#endif
