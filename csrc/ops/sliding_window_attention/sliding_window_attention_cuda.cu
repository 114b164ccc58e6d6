// One thread block per tile of 32 query rows: the tokens of a tile times the query heads of one key/value head, so that
// a key is loaded once for its whole group. Key blocks of 32 keys, aligned to absolute positions, pass through shared
// memory in f32. Four neighbouring threads share a row; each has 8 of its scores and a quarter of its output. A row
// that sees no key of a key block keeps its bits, so a result does not depend on the other rows of the tile.
#include "../cuda/common.cuh"
#include "../host_device.h"
#include "sliding_window_attention.h"

namespace mixtral {
namespace {

using namespace cuda;

constexpr int kRows = 32, kKeys = 32, kThreads = 128;
constexpr int kThreadsPerRow = kThreads / kRows, kKeysPerThread = kKeys / kThreadsPerRow;
constexpr int kWeightStride = kKeys + 1;

// Four floats of padding: rows start in different banks and stay 16-byte aligned.
constexpr int row_stride(int width) { return width + 4; }
constexpr int shared_floats(int width) { return (kRows + 2 * kKeys) * row_stride(width) + kRows * kWeightStride; }

// Query heads of one group that share a block; a group above 32 is split.
constexpr int64_t heads_per_tile(int64_t group) { return group < kRows ? group : kRows; }

// x [D] as f32 into shared memory [width], zeros from D on or where there is no row.
template <int kWidth, typename T>
__device__ __forceinline__ void load_row(const T* x, int head_dim, float* out) {
  for (int d = threadIdx.x % kWarpSize; d < kWidth; d += kWarpSize) out[d] = x && d < head_dim ? to_float(x[d]) : 0.0f;
}

__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

__device__ __forceinline__ void add_scaled(float4& sum, float weight, float4 x) {
  sum = {fmaf(weight, x.x, sum.x), fmaf(weight, x.y, sum.y), fmaf(weight, x.z, sum.z), fmaf(weight, x.w, sum.w)};
}

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
};

// The online softmax of the row of this thread, and its quarter of the output.
template <int kWidth>
struct RowState {
  float max = -INFINITY, sum = 0.0f;
  float4 acc[kWidth / 16] = {};  // columns 4 (part + 4 i) .. + 3 of the row
};

template <int kWidth, typename T>
__device__ __forceinline__ void load_queries(const AttentionProblem<T>& p, const HeadTile<T>& tile, float* q_tile) {
  for (int row = threadIdx.x / kWarpSize; row < kRows; row += kThreads / kWarpSize) {
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
  for (int j = threadIdx.x / kWarpSize; j < kKeys; j += kThreads / kWarpSize) {
    const int64_t key = block + j;
    const int64_t row = key >= range.begin && key < range.end ? p.keys.row(tile.tokens.sequence, key) : -1;
    const int64_t offset = (row * p.num_kv_heads + tile.kv_head) * p.head_dim;
    load_row<kWidth>(row < 0 ? nullptr : p.k + offset, head_dim, k_tile + j * row_stride(kWidth));
    load_row<kWidth>(row < 0 ? nullptr : p.v + offset, head_dim, v_tile + j * row_stride(kWidth));
  }
}

// Scores become weights [kKeys] of the row in shared memory; the sums so far are scaled to the new maximum.
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
  for (int j = 0; j < kKeys; ++j) {
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
__global__ void __launch_bounds__(kThreads) attention_tile_kernel(AttentionProblem<T> p, int tile_tokens) {
  extern __shared__ float4 shared[];
  float* q_tile = reinterpret_cast<float*>(shared);
  float* k_tile = q_tile + kRows * row_stride(kWidth);
  float* v_tile = k_tile + kKeys * row_stride(kWidth);
  const HeadTile<T> tile(p, tile_tokens);
  const QueryTile& tokens = tile.tokens;
  if (!p.holds(tokens)) return;
  load_queries<kWidth>(p, tile, q_tile);

  const int row = threadIdx.x / kThreadsPerRow, part = threadIdx.x % kThreadsPerRow;
  float* weights = v_tile + kKeys * row_stride(kWidth) + row * kWeightStride;
  const int64_t out_offset = tile.offset(p, row);
  const KeyRange seen = out_offset < 0 ? KeyRange{0, 0} : p.visible(tokens.sequence, tile.token(row));
  const KeyRange range{p.visible(tokens.sequence, tokens.begin).begin, p.visible(tokens.sequence, tokens.end - 1).end};
  RowState<kWidth> state;
  for (int64_t block = range.begin / kKeys * kKeys; block < range.end; block += kKeys) {
    __syncthreads();  // the previous block has been used
    load_keys<kWidth>(p, tile, block, range, k_tile, v_tile);
    __syncthreads();
    float scores[kKeysPerThread];
    row_scores<kWidth>(q_tile + row * row_stride(kWidth), k_tile, part, block, seen, p.scale, scores);
    update_softmax(scores, part, weights, state);
    add_values(weights, v_tile, part, state);
  }
  if (out_offset >= 0) store_row(state, part, static_cast<int>(p.head_dim), p.out + out_offset);
}

template <typename T, int kWidth>
int launch_width(const AttentionProblem<T>& p, cudaStream_t stream) {
  const int64_t group = p.num_heads / p.num_kv_heads, tile_heads = heads_per_tile(group);
  const int64_t tile_tokens = kRows / tile_heads, head_tiles = ceil_div(group, tile_heads);
  const dim3 grid(static_cast<unsigned>(num_query_tiles(p.tokens, p.sequences, tile_tokens)),
                  static_cast<unsigned>(p.num_kv_heads * head_tiles));
  constexpr int kBytes = shared_floats(kWidth) * static_cast<int>(sizeof(float));
  const auto kernel = attention_tile_kernel<T, kWidth>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kThreads, kBytes, stream>>>(p, static_cast<int>(tile_tokens));
  return cudaGetLastError();
}

}  // namespace

template <typename T>
int launch_attention_cuda(const AttentionProblem<T>& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.num_heads == 0) return cudaSuccess;
  if (p.head_dim <= 64) return launch_width<T, 64>(p, stream);
  if (p.head_dim <= 128) return launch_width<T, 128>(p, stream);
  static_assert(kMaxHeadDimCuda == 256);
  return launch_width<T, 256>(p, stream);
}

template int launch_attention_cuda(const AttentionProblem<float>&, cudaStream_t);
template int launch_attention_cuda(const AttentionProblem<BFloat16>&, cudaStream_t);
template int launch_attention_cuda(const AttentionProblem<Half>&, cudaStream_t);

}  // namespace mixtral
