// Which grouped products run on the kernels written for Hopper, and their launchers.
#pragma once

#include <climits>

#include "../grouped_gemm.h"
#include "../tiles.h"

namespace mixtral {

// TMA and 16-byte stores need aligned rows: K and the columns of out multiples of 8. Only shapes and pointers decide.
inline bool takes_grouped_gemm_tile_hopper(const GroupedGemm<BFloat16>& gemm, bool swiglu) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const int64_t columns = swiglu ? gemm.b.columns / 2 : gemm.b.columns;
  if (gemm.b.format != WeightFormat::kPlain) return false;
  if (gemm.rows <= 0 || gemm.b.experts <= 0 || columns <= 0 || gemm.b.depth <= 0) return false;
  if (gemm.b.depth % 8 != 0 || columns % 8 != 0) return false;
  if (gemm.rows > INT_MAX / 2 || gemm.b.columns > INT_MAX / 2 || gemm.b.depth > INT_MAX / 2) return false;
  if (gemm.b.experts > INT_MAX || max_gemm_tiles(gemm.b.experts, gemm.rows, 128, ceil_div(columns, 128)) > INT_MAX)
    return false;
  return aligned(gemm.a) && aligned(gemm.b.data) && aligned(gemm.out);
}

// Requires takes_grouped_gemm_tile_hopper. out is [M, N], or with swiglu [M, N / 2], with the bits of the plain product
// followed by swiglu.
int launch_grouped_gemm_tile_hopper(const GroupedGemm<BFloat16>& gemm, bool swiglu, cudaStream_t stream);

}  // namespace mixtral
