// The way of the sums to out in the grouped GEMM that streams weights: rounded, with SwiGLU if wanted, turned around in
// shared memory so that the columns of a token are neighbours, and stored in pieces of 16 bytes.
#pragma once

#include <cstdint>

#include "../../cuda/kernel_hopper.cuh"
#include "grouped_gemm_stream_hopper.h"
#include "grouped_gemm_stream_routing_hopper.cuh"
#include "swiglu_pair_hopper.cuh"

namespace mixtral::cuda {

// Columns of out that a warpgroup makes, and the bytes between tokens where they are staged: the 16 more put the eight
// rows that one stmatrix writes, and the pieces that are read back, into different banks.
template <bool kSwiglu>
struct StreamOutput {
  static constexpr int kColumns = kSwiglu ? 32 : 64, kPitch = kColumns * 2 + 16, kPieces = kColumns / 8;
};

// The pair of values of out that a thread has in 8x8 matrix `m`: 8 columns of out times 8 tokens.
template <bool kSwiglu, int kValues>
__device__ __forceinline__ uint32_t output_pair(const float (&sums)[kValues], int m) {
  if constexpr (kSwiglu) {
    return swiglu_pair(sums[m * 4], sums[m * 4 + 1], sums[m * 4 + 2], sums[m * 4 + 3]);
  } else {
    return pack_bf16(sums[m * 2], sums[m * 2 + 1]);
  }
}

// Values of tokens [first, first + kStaged) -> staged [tokens, columns], transposed.
template <int N, int kStaged, bool kSwiglu>
__device__ __forceinline__ void stage_sums(unsigned char* staged, const float (&sums)[N / 2], int first) {
  constexpr int kMatricesPerToken = kSwiglu ? 1 : 2;  // a warp's 16 rows of weights are 8 or 16 columns
  constexpr int kMatrices = (N < kStaged ? N : kStaged) / 8 * kMatricesPerToken;
  const int warp = threadIdx.x / kWarpSize % 4, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < kMatrices; m += 4) {  // of fewer than four, some are written twice
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] = output_pair<kSwiglu>(sums, first / 8 * kMatricesPerToken + (m + i) % kMatrices);
    const int own = (m + lane / 8) % kMatrices;
    const int token = own / kMatricesPerToken * 8 + lane % 8;
    const int column = (warp * kMatricesPerToken + own % kMatricesPerToken) * 8;
    store_matrices_transposed(staged + token * StreamOutput<kSwiglu>::kPitch + column * 2, words);
  }
}

// Staged tokens -> out, from row `row` and column `column` on, up to the ends of the unit and of out; zeros from row
// `zeros` on.
template <int kStaged, bool kSwiglu>
__device__ __forceinline__ void store_staged(const unsigned char* staged, const StreamGemm& gemm,
                                             const StreamRouting& routing, const GemmTile& unit, int64_t zeros,
                                             int64_t row, int64_t column) {
  using Output = StreamOutput<kSwiglu>;
  const int thread = threadIdx.x % 128, piece = thread % Output::kPieces;
  column += piece * 8;
  if (column >= gemm.columns) return;
  const int copies = static_cast<int>(gemm.routed.copies);
  for (int token = thread / Output::kPieces; token < kStaged && row + token < unit.row_end;
       token += 128 / Output::kPieces) {
    uint4 values = *reinterpret_cast<const uint4*>(staged + token * Output::kPitch + piece * 16);
    if (row + token >= zeros) values = uint4{0, 0, 0, 0};
#pragma unroll 1
    for (int copy = 0; copy < copies; ++copy) {  // of rows in groups, one
      const int64_t to = (row + token) * copies + copy;
      if (!gemm.routed.ids.data || routing.experts[to] == unit.expert)
        *reinterpret_cast<uint4*>(gemm.out + to * gemm.columns + column) = values;
    }
  }
}

}  // namespace mixtral::cuda
