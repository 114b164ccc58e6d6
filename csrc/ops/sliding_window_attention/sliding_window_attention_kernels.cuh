// One thread block per tile of 32 query rows: the tokens of a tile times the query heads of one key/value head, so that
// a key is loaded once for its whole group. Key blocks of 32 keys, aligned to absolute positions, pass through shared
// memory in f32. Four neighbouring threads share a row; each has 8 of its scores and a quarter of its output. A row
// that sees no key of a key block keeps its bits, so a result does not depend on the other rows of the tile.
#pragma once

#include "attention_rows.cuh"
#include "sliding_window_attention.h"

namespace mixtral::cuda {

inline constexpr int kAttentionRows = 32, kAttentionKeys = 32, kAttentionThreads = 128;
inline constexpr int kThreadsPerRow = kAttentionThreads / kAttentionRows,
                     kKeysPerThread = kAttentionKeys / kThreadsPerRow;
inline constexpr int kWeightStride = kAttentionKeys + 1;

constexpr int attention_shared_floats(int width) {
  return (kAttentionRows + 2 * kAttentionKeys) * row_stride(width) + kAttentionRows * kWeightStride;
}

// Query heads of one group that share a block; a group above 32 is split.
constexpr int64_t heads_per_tile(int64_t group) { return group < kAttentionRows ? group : kAttentionRows; }

// Scores of the keys `part` + 4 i of the block that starts at key `block`, -inf for a key out of sight.
template <int kWidth>
__device__ __forceinline__ void row_scores(const float* q_row, const float* k_tile, int part, int64_t block,
                                           const KeyRange& seen, float scale, float (&scores)[kKeysPerThread]) {
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) scores[i] = 0.0f;
#pragma unroll 4
  for (int d = 0; d < kWidth; d += 4) {
    const float4 q = *reinterpret_cast<const float4*>(q_row + d);
#pragma unroll
    for (int i = 0; i < kKeysPerThread; ++i) {
      const float* k = k_tile + (part + i * kThreadsPerRow) * row_stride(kWidth) + d;
      scores[i] = dot4(q, *reinterpret_cast<const float4*>(k), scores[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) {
    const int64_t key = block + part + i * kThreadsPerRow;
    scores[i] = key >= seen.begin && key < seen.end ? scores[i] * scale : -INFINITY;
  }
}

// Reductions over the four threads of a row.
__device__ __forceinline__ float row_max(float x) {
  for (int offset = 1; offset < kThreadsPerRow; offset *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

__device__ __forceinline__ float row_sum(float x) {
  for (int offset = 1; offset < kThreadsPerRow; offset *= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The tile of a block: its tokens and query heads.
template <typename T>
struct HeadTile {
  QueryTile tokens;
  int64_t kv_head, first_head, heads;  // the first query head, from the first one of the group

  __device__ HeadTile(const AttentionProblem<T>& p, int tile_tokens) {
    tokens = query_tile(p.cu_seqlens_q, p.sequences, tile_tokens, blockIdx.x);
    heads = heads_per_tile(p.num_heads / p.num_kv_heads);
    kv_head = blockIdx.y % p.num_kv_heads;
    first_head = blockIdx.y / p.num_kv_heads * heads;
  }

  __device__ int64_t token(int row) const { return tokens.begin + row / heads; }

  // Offset of a query row in q and out; -1 for a row of the tile that does not exist.
  __device__ int64_t offset(const AttentionProblem<T>& p, int row) const {
    const int64_t group = p.num_heads / p.num_kv_heads, head = first_head + row % heads;
    return token(row) < tokens.end && head < group ? (token(row) * p.num_heads + kv_head * group + head) * p.head_dim
                                                   : -1;
  }

  __device__ int64_t lse_index(const AttentionProblem<T>& p, int row) const {
    return (kv_head * (p.num_heads / p.num_kv_heads) + first_head + row % heads) * p.tokens + token(row);
  }
};

// The online softmax of the row of this thread, and its quarter of the output.
template <int kWidth>
struct RowState {
  float max = -INFINITY, sum = 0.0f;
  float4 acc[kWidth / 16] = {};  // columns 4 (part + 4 i) .. + 3 of the row
};

template <int kWidth, typename T>
__device__ __forceinline__ void load_queries(const AttentionProblem<T>& p, const HeadTile<T>& tile, float* q_tile) {
  for (int row = threadIdx.x / kWarpSize; row < kAttentionRows; row += kAttentionThreads / kWarpSize) {
    const int64_t offset = tile.offset(p, row);
    load_row<kWidth>(offset < 0 ? nullptr : p.q + offset, static_cast<int>(p.head_dim),
                     q_tile + row * row_stride(kWidth));
  }
}

// The keys and values of the block that starts at key `block`; zeros for keys outside `range`.
template <int kWidth, typename T>
__device__ __forceinline__ void load_keys(const AttentionProblem<T>& p, const HeadTile<T>& tile, int64_t block,
                                          const KeyRange& range, float* k_tile, float* v_tile) {
  const int head_dim = static_cast<int>(p.head_dim);
  for (int j = threadIdx.x / kWarpSize; j < kAttentionKeys; j += kAttentionThreads / kWarpSize) {
    const int64_t key = block + j;
    const int64_t row = key >= range.begin && key < range.end ? p.keys.row(tile.tokens.sequence, key) : -1;
    const int64_t offset = (row * p.num_kv_heads + tile.kv_head) * p.head_dim;
    load_row<kWidth>(row < 0 ? nullptr : p.k + offset, head_dim, k_tile + j * row_stride(kWidth));
    load_row<kWidth>(row < 0 ? nullptr : p.v + offset, head_dim, v_tile + j * row_stride(kWidth));
  }
}

// Scores become weights [kAttentionKeys] of the row in shared memory; the sums so far are scaled to the new maximum.
template <int kWidth>
__device__ __forceinline__ void update_softmax(const float (&scores)[kKeysPerThread], int part, float* weights,
                                               RowState<kWidth>& state) {
  float max = state.max;
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) max = fmaxf(max, scores[i]);
  max = row_max(max);
  const float origin = max == -INFINITY ? 0.0f : max;  // nothing seen so far: all weights are exp(-inf)
  const float correction = expf(state.max - origin);
  float block_weight = 0.0f;
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) {
    const float weight = expf(scores[i] - origin);
    weights[part + i * kThreadsPerRow] = weight;
    block_weight += weight;
  }
  state.max = max;
  state.sum = state.sum * correction + row_sum(block_weight);
  __syncwarp();  // the threads of a row sit in one warp
#pragma unroll
  for (float4& x : state.acc) x = {x.x * correction, x.y * correction, x.z * correction, x.w * correction};
}

template <int kWidth>
__device__ __forceinline__ void add_values(const float* weights, const float* v_tile, int part,
                                           RowState<kWidth>& state) {
  for (int j = 0; j < kAttentionKeys; ++j) {
    const float weight = weights[j];
    if (weight == 0.0f) continue;  // a key out of sight may hold NaN
    const float* v = v_tile + j * row_stride(kWidth) + part * 4;
#pragma unroll
    for (int i = 0; i < kWidth / 16; ++i)
      add_scaled(state.acc[i], weight, *reinterpret_cast<const float4*>(v + i * 16));
  }
}

// out [D]
template <int kWidth, typename T>
__device__ __forceinline__ void store_row(const RowState<kWidth>& state, int part, int head_dim, T* out) {
  const float inverse = state.sum == 0.0f ? 0.0f : 1.0f / state.sum;  // 0: no key was seen
#pragma unroll
  for (int i = 0; i < kWidth / 16; ++i) {
    const float values[4] = {state.acc[i].x, state.acc[i].y, state.acc[i].z, state.acc[i].w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int d = 4 * (part + 4 * i) + c;
      if (d < head_dim) out[d] = from_float<T>(values[c] * inverse);
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads) attention_tile_kernel(AttentionProblem<T> p, int tile_tokens) {
  float* q_tile = reinterpret_cast<float*>(dynamic_shared_memory());
  float* k_tile = q_tile + kAttentionRows * row_stride(kWidth);
  float* v_tile = k_tile + kAttentionKeys * row_stride(kWidth);
  const HeadTile<T> tile(p, tile_tokens);
  const QueryTile& tokens = tile.tokens;
  if (!p.holds(tokens)) return;
  load_queries<kWidth>(p, tile, q_tile);

  const int row = threadIdx.x / kThreadsPerRow, part = threadIdx.x % kThreadsPerRow;
  float* weights = v_tile + kAttentionKeys * row_stride(kWidth) + row * kWeightStride;
  const int64_t out_offset = tile.offset(p, row);
  const KeyRange seen = out_offset < 0 ? KeyRange{0, 0} : p.visible(tokens.sequence, tile.token(row));
  const KeyRange range{p.visible(tokens.sequence, tokens.begin).begin, p.visible(tokens.sequence, tokens.end - 1).end};
  RowState<kWidth> state;
  for (int64_t block = range.begin / kAttentionKeys * kAttentionKeys; block < range.end; block += kAttentionKeys) {
    __syncthreads();  // the previous block has been used
    load_keys<kWidth>(p, tile, block, range, k_tile, v_tile);
    __syncthreads();
    float scores[kKeysPerThread];
    row_scores<kWidth>(q_tile + row * row_stride(kWidth), k_tile, part, block, seen, p.scale, scores);
    update_softmax(scores, part, weights, state);
    add_values(weights, v_tile, part, state);
  }
  if (out_offset < 0) return;
  store_row(state, part, static_cast<int>(p.head_dim), p.out + out_offset);
  if (p.lse && part == 0) p.lse[tile.lse_index(p, row)] = state.sum == 0.0f ? -INFINITY : state.max + logf(state.sum);
}

}  // namespace mixtral::cuda
