// The 16 query rows of a warp of attention_decode_hopper.cuh, and their update with a chunk of keys.
#pragma once

#include "../../cuda/kernel_hopper.cuh"  // ldmatrix, mma
#include "attention_decode_hopper.h"

namespace mixtral::cuda {

inline constexpr int kChunkKeys = 16;  // keys of one product of the tensor cores

// The query rows of a block: pairs (token, head), token by token.
struct DecodeTile {
  QueryTile tokens;
  int64_t first_head;  // of the group
  int group, rows;     // query heads that share the key/value head; rows of the tile that exist

  // Offset of a row in q and out.
  __device__ int64_t offset(const DecodeProblem& p, int row) const {
    return ((tokens.begin + row / group) * p.num_heads + first_head + row % group) * p.head_dim;
  }
};

// The 16 query rows of a warp. Thread l holds rows l / 4 and l / 4 + 8, as fragments of the tensor cores.
template <int kHeadDim>
struct DecodeRows {
  uint32_t q[kHeadDim / 16][4];
  int begin[2];       // first key that the row sees, from the first key of the split
  unsigned count[2];  // how many it sees
  float out[kHeadDim / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};  // over the keys of this thread
};

// For a row that does not exist, the first row of q is loaded, and it sees the keys of the whole tile, so that it needs
// no mask. Its result is not stored.
template <int kHeadDim>
__device__ __forceinline__ void load_rows(const DecodeProblem& p, const DecodeTile& tile, int first_row,
                                          const KeyRange& range, int64_t origin, DecodeRows<kHeadDim>& rows) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + half * 8;
    const bool exists = row < tile.rows;
    const KeyRange seen = exists ? p.visible(tile.tokens.sequence, tile.tokens.begin + row / tile.group) : range;
    rows.begin[half] = static_cast<int>(seen.begin - origin);
    rows.count[half] = seen.end > seen.begin ? static_cast<unsigned>(seen.end - seen.begin) : 0u;
    const BFloat16* q = p.q + (exists ? tile.offset(p, row) : 0) + lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        rows.q[step][half + 2 * i] = *reinterpret_cast<const uint32_t*>(q + step * 16 + i * 8);
    }
  }
}

// The rows of a warp as a part of the result: [16, stride] in shared memory.
template <int kHeadDim>
__device__ __forceinline__ void store_part(const DecodeRows<kHeadDim>& rows, float* part) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* row = part + (lane / 4 + half * 8) * decode_part_stride(kHeadDim);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
      *reinterpret_cast<float2*>(row + n * 8 + lane % 4 * 2) = {rows.out[n][half * 2], rows.out[n][half * 2 + 1]};
    float sum = rows.sum[half] + __shfl_xor_sync(0xffffffffu, rows.sum[half], 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) *reinterpret_cast<float2*>(row + kHeadDim) = {rows.max[half], sum};
  }
}

// scores[t][i]: of row i / 2 of the thread with key 8 t + 2 (lane % 4) + i % 2 of the chunk.
template <int kHeadDim>
__device__ __forceinline__ void chunk_scores(const DecodeRows<kHeadDim>& rows, const unsigned char* keys, int first_key,
                                             float (&scores)[2][4]) {
  const int lane = threadIdx.x % kWarpSize, key = first_key + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t k[4];
    load_matrices(k, keys + decode_tile_offset<kHeadDim>(key, 2 * step + lane / 8 % 2));
    mma_bf16(scores[0], rows.q[step], k[0], k[1]);
    mma_bf16(scores[1], rows.q[step], k[2], k[3]);
  }
}

// Scores become weights under the maximum so far, in base 2; sums under the old maximum are scaled. Returns
// whether a row of this thread does not see a key of the chunk that starts at `first`, counted as rows.begin.
template <int kHeadDim>
__device__ __forceinline__ bool chunk_weights(DecodeRows<kHeadDim>& rows, int first, float scale,
                                              float (&scores)[2][4]) {
  bool all_seen = true;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float max = rows.max[half];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[i / 2][half * 2 + i % 2];
      const int key = first + i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
      const bool seen = static_cast<unsigned>(key - rows.begin[half]) < rows.count[half];
      all_seen = all_seen && seen;
      score = seen ? score * scale : -INFINITY;
      max = fmaxf(max, score);
    }
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
    const float origin = max == -INFINITY ? 0.0f : max;  // nothing seen so far: all weights are exp2(-inf)
    const float correction = exp2f(rows.max[half] - origin);
    rows.max[half] = max;
    rows.sum[half] *= correction;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[i / 2][half * 2 + i % 2];
      score = to_float(from_float<BFloat16>(exp2f(score - origin)));  // rounded as for the product with the values
      rows.sum[half] += score;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      rows.out[n][half * 2] *= correction;
      rows.out[n][half * 2 + 1] *= correction;
    }
  }
  return !all_seen;
}

// Of a pair of bf16 values, the bits of those that are infinite or NaN.
__device__ __forceinline__ uint32_t not_finite(uint32_t pair) {
  return ((pair & 0x7F80u) == 0x7F80u ? pair & 0xFFFFu : 0u) |
         ((pair & 0x7F800000u) == 0x7F800000u ? pair & 0xFFFF0000u : 0u);
}

// Adds weight times value to the rows that see the key, one key after the other: 0 times infinity must not reach a row
// that does not. b0, b1: fragments of the values of the chunk that starts at `first`.
template <int kHeadDim>
__device__ __forceinline__ void add_to_seeing_rows(const DecodeRows<kHeadDim>& rows, int first,
                                                   const uint32_t (&weights)[4], uint32_t b0, uint32_t b1,
                                                   float (&out)[4]) {
#pragma unroll 1
  for (int key = 0; key < kChunkKeys; ++key) {
    const uint32_t pair = key % 2 ? 0xFFFF0000u : 0xFFFFu;
    const bool mine = key % 8 / 2 == static_cast<int>(threadIdx.x % 4);
    float product[4] = {};
    mma_bf16(product, weights, mine && key < 8 ? b0 & pair : 0u, mine && key >= 8 ? b1 & pair : 0u);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (static_cast<unsigned>(first + key - rows.begin[i / 2]) < rows.count[i / 2]) out[i] += product[i];
    }
  }
}

// rows.out += weights * values of the chunk. kPartlySeen: some row does not see some key, whose value may be infinite.
template <int kHeadDim, bool kPartlySeen>
__device__ __forceinline__ void add_values(DecodeRows<kHeadDim>& rows, const float (&scores)[2][4],
                                           const unsigned char* values, int first_key, int first) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t weights[4] = {pack_bf16(scores[0][0], scores[0][1]), pack_bf16(scores[0][2], scores[0][3]),
                               pack_bf16(scores[1][0], scores[1][1]), pack_bf16(scores[1][2], scores[1][3])};
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t v[4], spoilt[4];
    load_matrices_transposed(v, values + decode_tile_offset<kHeadDim>(first_key + lane % 16, 2 * step + lane / 16));
    if (kPartlySeen) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] ^= spoilt[i] = not_finite(v[i]);
    }
    mma_bf16(rows.out[2 * step], weights, v[0], v[1]);
    mma_bf16(rows.out[2 * step + 1], weights, v[2], v[3]);
    if (kPartlySeen && __ballot_sync(0xffffffffu, (spoilt[0] | spoilt[1] | spoilt[2] | spoilt[3]) != 0)) {
      add_to_seeing_rows(rows, first, weights, spoilt[0], spoilt[1], rows.out[2 * step]);
      add_to_seeing_rows(rows, first, weights, spoilt[2], spoilt[3], rows.out[2 * step + 1]);
    }
  }
}

}  // namespace mixtral::cuda
