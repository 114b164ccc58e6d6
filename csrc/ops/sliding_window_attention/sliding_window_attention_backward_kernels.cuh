// Two kernels, neither of them tuned: one block per tile of queries and head computes dQ (and D), then one block per
// tile of keys and key/value head computes dK and dV, query head after query head. Each computes P and dS again from
// the rows of a tile, which pass through shared memory in f32. Four neighbouring threads share a row of the block; each
// has a quarter of its weights and a quarter of its sums. Sums run over keys and over queries in order: there are no
// atomics.
//
// A weight of zero is not multiplied: a key out of sight, or a query that does not see it, may hold NaN.
#pragma once

#include "attention_rows.cuh"
#include "sliding_window_attention_backward.h"

namespace mixtral::cuda {

// Rows of a tile of queries or keys: four tiles fit into 96 KiB of shared memory.
constexpr int backward_rows(int width) { return width <= 128 ? 32 : 16; }
constexpr int backward_threads(int width) { return 4 * backward_rows(width); }
// A block may have all registers it needs, hence the 1 of the launch bounds: shared memory limits how many blocks fit,
// and left alone the compiler saves registers on the stack for more of them.

// Tiles of Q, dO, K and V; P and dS; lse and D
constexpr int backward_shared_floats(int width) {
  const int rows = backward_rows(width);
  return 4 * rows * row_stride(width) + 2 * rows * (rows + 1) + 2 * rows;
}

template <int kWidth>
struct BackwardShared {
  static constexpr int kRows = backward_rows(kWidth), kStride = row_stride(kWidth), kWeightStride = kRows + 1;
  float *q, *grad, *k, *v;  // [rows, width], of row stride kStride
  float *weights, *ds;      // [rows, rows], of row stride kWeightStride: a row for each row of the block
  float *lse, *delta;       // [rows]

  __device__ explicit BackwardShared(float* memory) {
    constexpr int kTile = kRows * kStride;
    q = memory;
    grad = q + kTile;
    k = grad + kTile;
    v = k + kTile;
    weights = v + kTile;
    ds = weights + kRows * kWeightStride;
    lse = ds + kRows * kWeightStride;
    delta = lse + kRows;
  }
};

// x [D] of row 0; the tile gets rows [0, count), `stride` values apart, and zeros after them.
template <int kWidth, typename T>
__device__ __forceinline__ void load_tile(const T* x, int64_t stride, int64_t count, int head_dim, float* tile) {
  constexpr int kRows = backward_rows(kWidth);
  for (int row = threadIdx.x / kWarpSize; row < kRows; row += backward_threads(kWidth) / kWarpSize)
    load_row<kWidth>(row < count ? x + row * stride : nullptr, head_dim, tile + row * row_stride(kWidth));
}

template <int kWidth>
__device__ __forceinline__ float dot(const float* a, const float* b) {
  float sum = 0.0f;
#pragma unroll 8
  for (int d = 0; d < kWidth; d += 4)
    sum = dot4(*reinterpret_cast<const float4*>(a + d), *reinterpret_cast<const float4*>(b + d), sum);
  return sum;
}

// A quarter of a row of sums: columns 4 (part + 4 i) .. + 3.
template <int kWidth>
struct RowSums {
  float4 values[kWidth / 16] = {};

  // += weights [rows] * tile
  __device__ __forceinline__ void add(const float* weights, const float* tile, int part) {
    for (int j = 0; j < backward_rows(kWidth); ++j) {
      const float weight = weights[j];
      if (weight == 0.0f) continue;
      const float* row = tile + j * row_stride(kWidth) + part * 4;
#pragma unroll
      for (int i = 0; i < kWidth / 16; ++i)
        add_scaled(values[i], weight, *reinterpret_cast<const float4*>(row + i * 16));
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(float scale, int part, int64_t head_dim, T* out) const {
#pragma unroll
    for (int i = 0; i < kWidth / 16; ++i) {
      const float sums[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t d = 4 * (part + 4 * i) + c;
        if (d < head_dim) out[d] = from_float<T>(sums[c] * scale);
      }
    }
  }
};

// The query heads of a key/value head. Divisions of 64 bits are calls, around which a kernel saves registers.
template <typename T>
__device__ __forceinline__ unsigned group_size(const AttentionProblem<T>& p) {
  return static_cast<unsigned>(p.num_heads) / static_cast<unsigned>(p.num_kv_heads);
}

struct WeightAndGradient {
  float weight, ds;
};

// P and dS of one query and one key that it sees
template <int kWidth>
__device__ __forceinline__ WeightAndGradient weight_and_gradient(const BackwardShared<kWidth>& shared, int query,
                                                                 int key, float scale, float lse, float delta) {
  const int q = query * row_stride(kWidth), k = key * row_stride(kWidth);
  const float weight = expf(fmaf(dot<kWidth>(shared.q + q, shared.k + k), scale, -lse));
  return {weight, weight * (dot<kWidth>(shared.grad + q, shared.v + k) - delta)};
}

// Block (t, h): tile t of queries, query head h.
template <typename T, int kWidth>
__global__ void __launch_bounds__(backward_threads(kWidth), 1)
    attention_backward_queries_kernel(AttentionBackwardProblem<T> problem) {
  constexpr int kRows = backward_rows(kWidth);
  const AttentionProblem<T>& p = problem.forward;
  const BackwardShared<kWidth> shared(reinterpret_cast<float*>(dynamic_shared_memory()));
  const QueryTile tile = query_tile(p.cu_seqlens_q, p.sequences, kRows, blockIdx.x);
  if (!p.holds(tile)) return;
  const int64_t head = blockIdx.y, kv_head = blockIdx.y / group_size(p), count = tile.end - tile.begin;
  const int64_t stride = p.num_heads * p.head_dim, first = tile.begin * stride + head * p.head_dim;
  const int64_t k_stride = p.num_kv_heads * p.head_dim;
  const int head_dim = static_cast<int>(p.head_dim), row = threadIdx.x / 4, part = threadIdx.x % 4;
  load_tile<kWidth>(p.q + first, stride, count, head_dim, shared.q);
  load_tile<kWidth>(problem.grad + first, stride, count, head_dim, shared.grad);
  load_tile<kWidth>(problem.out + first, stride, count, head_dim, shared.k);
  __syncthreads();
  const bool exists = row < count;
  const int64_t token = tile.begin + row, index = head * p.tokens + token;
  const float delta = dot<kWidth>(shared.grad + row * row_stride(kWidth), shared.k + row * row_stride(kWidth));
  const float lse = exists ? problem.lse[index] : 0.0f;
  if (exists && part == 0) problem.delta[index] = delta;

  const KeyRange seen = exists ? p.visible(tile.sequence, token) : KeyRange{0, 0};
  KeyRange range{p.visible(tile.sequence, tile.begin).begin, p.visible(tile.sequence, tile.end - 1).end};
  const int64_t begin_k = p.keys.cu_seqlens[tile.sequence];
  if (begin_k < 0 || begin_k + range.end > p.keys.page_size) range = {0, 0};  // cu_seqlens is unchecked
  float* ds = shared.ds + row * BackwardShared<kWidth>::kWeightStride;
  RowSums<kWidth> sums;
  for (int64_t block = range.begin; block < range.end; block += kRows) {
    __syncthreads();  // the previous block has been used
    const int64_t from = (begin_k + block) * k_stride + kv_head * p.head_dim;
    load_tile<kWidth>(p.k + from, k_stride, range.end - block, head_dim, shared.k);
    load_tile<kWidth>(p.v + from, k_stride, range.end - block, head_dim, shared.v);
    __syncthreads();
    for (int j = part; j < kRows; j += 4) {
      const int64_t key = block + j;
      ds[j] = key >= seen.begin && key < seen.end ? weight_and_gradient(shared, row, j, p.scale, lse, delta).ds : 0.0f;
    }
    __syncwarp();  // the threads of a row sit in one warp
    sums.add(ds, shared.k, part);
  }
  if (exists) sums.store(p.scale, part, p.head_dim, problem.grad_q + first + row * stride);
}

// Block (t, h): tile t of keys, key/value head h. After the kernel above.
template <typename T, int kWidth>
__global__ void __launch_bounds__(backward_threads(kWidth), 1)
    attention_backward_keys_kernel(AttentionBackwardProblem<T> problem) {
  constexpr int kRows = backward_rows(kWidth);
  const AttentionProblem<T>& p = problem.forward;
  const BackwardShared<kWidth> shared(reinterpret_cast<float*>(dynamic_shared_memory()));
  const QueryTile tile = query_tile(p.keys.cu_seqlens, p.sequences, kRows, blockIdx.x);  // of keys
  if (tile.begin < 0 || tile.begin >= tile.end || tile.end > p.keys.page_size) return;
  const int64_t kv_head = blockIdx.y, group = group_size(p), count = tile.end - tile.begin;
  const int64_t k_stride = p.num_kv_heads * p.head_dim, first = tile.begin * k_stride + kv_head * p.head_dim;
  const int64_t stride = p.num_heads * p.head_dim;
  const int head_dim = static_cast<int>(p.head_dim), thread = threadIdx.x, row = thread / 4, part = thread % 4;
  load_tile<kWidth>(p.k + first, k_stride, count, head_dim, shared.k);
  load_tile<kWidth>(p.v + first, k_stride, count, head_dim, shared.v);

  const int64_t begin_q = p.cu_seqlens_q[tile.sequence], end_q = p.cu_seqlens_q[tile.sequence + 1];
  const int64_t begin_k = p.keys.cu_seqlens[tile.sequence], key = tile.begin + row - begin_k;
  const auto seeing = [&](const KeyRange& keys) {
    return seeing_queries(keys, end_q - begin_q, p.keys.length(tile.sequence), p.window, p.causal);
  };
  const QueryRange own = row < count ? seeing({key, key + 1}) : QueryRange{0, 0};
  QueryRange range = seeing({tile.begin - begin_k, tile.end - begin_k});
  if (begin_q < 0 || end_q > p.tokens) range = {0, 0};  // cu_seqlens is unchecked
  float* weights = shared.weights + row * BackwardShared<kWidth>::kWeightStride;
  float* ds = shared.ds + row * BackwardShared<kWidth>::kWeightStride;
  RowSums<kWidth> sums_k, sums_v;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t block = range.begin; block < range.end; block += kRows) {
      __syncthreads();  // the previous block has been used
      const int64_t token = begin_q + block, from = token * stride + head * p.head_dim, queries = range.end - block;
      load_tile<kWidth>(p.q + from, stride, queries, head_dim, shared.q);
      load_tile<kWidth>(problem.grad + from, stride, queries, head_dim, shared.grad);
      if (thread < kRows && thread < queries) {
        shared.lse[thread] = problem.lse[head * p.tokens + token + thread];
        shared.delta[thread] = problem.delta[head * p.tokens + token + thread];
      }
      __syncthreads();
      for (int i = part; i < kRows; i += 4) {
        weights[i] = ds[i] = 0.0f;
        if (block + i < own.begin || block + i >= own.end) continue;
        const WeightAndGradient pair = weight_and_gradient(shared, i, row, p.scale, shared.lse[i], shared.delta[i]);
        weights[i] = pair.weight;
        ds[i] = pair.ds;
      }
      __syncwarp();  // the threads of a row sit in one warp
      sums_k.add(ds, shared.q, part);
      sums_v.add(weights, shared.grad, part);
    }
  }
  if (row >= count) return;
  sums_k.store(p.scale, part, p.head_dim, problem.grad_k + first + row * k_stride);
  sums_v.store(1.0f, part, p.head_dim, problem.grad_v + first + row * k_stride);
}

}  // namespace mixtral::cuda
