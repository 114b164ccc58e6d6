#include <algorithm>

#include "../cpu/simd.h"
#include "../pack_weight/e4m3.h"
#include "grouped_gemm.h"

namespace mixtral {

using namespace cpu;

namespace {

// a [depth] -> out [depth]
MIXTRAL_INLINE void round_row(const BFloat16* a, int64_t depth, BFloat16* out) {
  uint32_t largest = 0;  // magnitudes are compared as bits: inf and NaN are larger than all others
  for (int64_t k = 0; k < depth; ++k) largest = std::max(largest, float_to_bits(to_float(a[k])) & 0x7fffffff);
  const float scale = bits_to_float(e4m3_scale_bits(largest)), inverse = 1 / scale;
  for (int64_t k = 0; k < depth; ++k)
    out[k] = from_float<BFloat16>(from_e4m3(to_e4m3(to_float(a[k]) * inverse)) * scale);
}

}  // namespace

void launch_round_to_e4m3_cpu(const BFloat16* a, int64_t depth, BFloat16* out, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row)
    for_cpu_isa([&] { round_row(a + row * depth, depth, out + row * depth); });
}

}  // namespace mixtral
