// Attention of few query tokens per sequence, bf16, over packed or paged keys. Include the building blocks first.
#pragma once

#include "attention_decode_hopper.h"

namespace mixtral::cuda {

inline constexpr int kDecodeThreads = 128, kDecodeWarps = 4, kDecodeStages = 3;
inline constexpr int kChunkKeys = kDecodeKeys / kDecodeWarps;  // keys of one tensor core product

template <int kHeadDim>
struct DecodeShared {
  struct Stage {
    unsigned char keys[kDecodeKeys * kHeadDim * 2], values[kDecodeKeys * kHeadDim * 2];
  };
  union {
    Stage ring[kDecodeStages];
    float parts[kMaxDecodeRows * decode_part_stride(kHeadDim)];  // of the four warps, when the keys have passed by
  };
  int is_last;
};

// What a warp knows of its 16 query rows. Thread l holds rows l / 4 and l / 4 + 8, as fragments of the tensor cores.
template <int kHeadDim>
struct DecodeRows {
  uint32_t q[kHeadDim / 16][4];
  int begin[2];            // first key that the row sees, from the first key of the split
  unsigned count[2];       // how many it sees
  float out[kHeadDim / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};       // over the keys of this thread
};

// Starts the copies of 16 keys and values. offset: of the key lane % 16 in k and v, -1: zeros.
template <int kHeadDim>
__device__ __forceinline__ void copy_keys(const DecodeProblem& p, int64_t offset, int first_key,
                                          typename DecodeShared<kHeadDim>::Stage& stage) {
  constexpr int kChunks = kHeadDim / 8, kKeysAtOnce = kWarpSize / kChunks;  // whole rows: full lines of memory
  const int lane = threadIdx.x % kWarpSize, chunk = lane % kChunks;
#pragma unroll
  for (int i = 0; i < kChunkKeys; i += kKeysAtOnce) {
    const int key = i + lane / kChunks;
    const int64_t from = __shfl_sync(0xffffffffu, offset, key);
    const int to = decode_tile_offset<kHeadDim>(first_key + key, chunk);
    const bool valid = from >= 0;
    copy_async_16(stage.keys + to, p.k + (valid ? from + chunk * 8 : 0), valid);
    copy_async_16(stage.values + to, p.v + (valid ? from + chunk * 8 : 0), valid);
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

// Scores become weights under the maximum so far, in base 2; what was summed under the old maximum is scaled. Returns
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
      score = exp2f(score - origin);
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

// A row of the result in the making: lane l of a warp has columns from l * kHeadDim / 32 on.
template <int kHeadDim>
struct MergedRow {
  struct alignas(kHeadDim / 8) Columns {
    float at[kHeadDim / kWarpSize];
  } values = {};
  float max, sum;
};

// Merges the parts of a row, `stride` floats apart, in their order. At most 32: each lane weighs one.
template <int kHeadDim>
__device__ __forceinline__ MergedRow<kHeadDim> merge_parts(const float* row, int parts, int64_t stride) {
  using Columns = typename MergedRow<kHeadDim>::Columns;
  const int lane = threadIdx.x % kWarpSize;
  const bool mine = lane < parts;
  const float max = mine ? row[lane * stride + kHeadDim] : -INFINITY;
  const float sum = mine ? row[lane * stride + kHeadDim + 1] : 0.0f;
  MergedRow<kHeadDim> merged;
  merged.max = max;
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    merged.max = fmaxf(merged.max, __shfl_xor_sync(0xffffffffu, merged.max, mask));
  const float weight = exp2f(max - (merged.max == -INFINITY ? 0.0f : merged.max));
  merged.sum = warp_sum(weight * sum);
#pragma unroll 8
  for (int i = 0; i < parts; ++i) {
    const Columns part = *reinterpret_cast<const Columns*>(row + i * stride + lane * (kHeadDim / kWarpSize));
    const float part_weight = __shfl_sync(0xffffffffu, weight, i);
#pragma unroll
    for (int c = 0; c < kHeadDim / kWarpSize; ++c)
      merged.values.at[c] = fmaf(part_weight, part.at[c], merged.values.at[c]);
  }
  return merged;
}

template <int kHeadDim>
__device__ __forceinline__ void store_merged(const MergedRow<kHeadDim>& row, float* part) {
  using Columns = typename MergedRow<kHeadDim>::Columns;
  const int lane = threadIdx.x % kWarpSize;
  *reinterpret_cast<Columns*>(part + lane * (kHeadDim / kWarpSize)) = row.values;
  if (lane == 0) *reinterpret_cast<float2*>(part + kHeadDim) = {row.max, row.sum};
}

template <int kHeadDim>
__device__ __forceinline__ void store_result(const MergedRow<kHeadDim>& row, BFloat16* out) {
  struct alignas(kHeadDim / 16) Packed {
    uint32_t pairs[kHeadDim / kWarpSize / 2];
  } packed;
  const float inverse = row.sum == 0.0f ? 0.0f : 1.0f / row.sum;  // 0: no key was seen
#pragma unroll
  for (int i = 0; i < kHeadDim / kWarpSize / 2; ++i)
    packed.pairs[i] = pack_bf16(row.values.at[2 * i] * inverse, row.values.at[2 * i + 1] * inverse);
  *reinterpret_cast<Packed*>(out + threadIdx.x % kWarpSize * (kHeadDim / kWarpSize)) = packed;
}

// Whether this block is the last one to say that its part is written; if so, it sees all of them.
__device__ __forceinline__ bool last_to_arrive(int* arrivals, int blocks, int* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *shared = atomicAdd(arrivals, 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return *shared;
}

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

// Rows that do not exist see what the tile sees, so that they call for no mask; their zeros are not stored.
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
        rows.q[step][half + 2 * i] = exists ? *reinterpret_cast<const uint32_t*>(q + step * 16 + i * 8) : 0u;
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

// Passes the keys of this split by the rows of this warp.
template <int kHeadDim>
__device__ __forceinline__ void attend_keys(const DecodeProblem& p, const DecodeTile& tile, int64_t kv_head,
                                            const KeyRange& range, const KeyBlocks& blocks, int row_tiles,
                                            DecodeShared<kHeadDim>& shared, DecodeRows<kHeadDim>& rows) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_blocks = static_cast<int>(blocks.end - blocks.begin);
  // Where the key of this thread lies in k and v, or -1; looked up a block before its copy, as it takes two loads.
  const auto offset_in_block = [&](int block) -> int64_t {
    const int64_t key = (blocks.begin + block) * kDecodeKeys + warp * kChunkKeys + lane % kChunkKeys;
    if (block >= num_blocks || key < range.begin || key >= range.end) return -1;
    const int64_t row = p.keys.row(tile.tokens.sequence, key);
    return row < 0 ? -1 : (row * p.num_kv_heads + kv_head) * kHeadDim;
  };
  const int warps_per_row = kDecodeWarps / row_tiles;
  int next = 0, next_stage = 0;
  int64_t offset = offset_in_block(0);
  const auto copy_next = [&] {
    if (next < num_blocks) copy_keys<kHeadDim>(p, offset, warp * kChunkKeys, shared.ring[next_stage]);
    commit_copies();
    offset = offset_in_block(++next);
    next_stage = next_stage == kDecodeStages - 1 ? 0 : next_stage + 1;
  };
#pragma unroll 1
  for (int i = 0; i < kDecodeStages - 1; ++i) copy_next();
  load_rows(p, tile, warp % row_tiles * kDecodeTileRows, range, blocks.begin * kDecodeKeys, rows);
  const float scale = p.scale * 1.4426950408889634f;  // of scores in base 2

  for (int block = 0, stage = 0; block < num_blocks; ++block, stage = stage == kDecodeStages - 1 ? 0 : stage + 1) {
    wait_copies<kDecodeStages - 2>();
    __syncthreads();  // the block is here, and the stage of the block before it is free
    copy_next();
#pragma unroll 1
    for (int chunk = warp / row_tiles; chunk < kDecodeWarps; chunk += warps_per_row) {
      const int first = block * kDecodeKeys + chunk * kChunkKeys;
      float scores[2][4] = {};
      chunk_scores(rows, shared.ring[stage].keys, chunk * kChunkKeys, scores);
      const bool partly_seen = chunk_weights(rows, first, scale, scores);
      if (__ballot_sync(0xffffffffu, partly_seen))
        add_values<kHeadDim, true>(rows, scores, shared.ring[stage].values, chunk * kChunkKeys, first);
      else
        add_values<kHeadDim, false>(rows, scores, shared.ring[stage].values, chunk * kChunkKeys, first);
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attention_decode_kernel(DecodeProblem p, DecodePlan plan, DecodeWorkspace workspace) {
  constexpr int kStride = decode_part_stride(kHeadDim);
  auto& shared = *reinterpret_cast<DecodeShared<kHeadDim>*>(dynamic_shared_memory());
  const int64_t kv_head = blockIdx.y;
  const int split = blockIdx.z, group = static_cast<int>(p.num_heads / p.num_kv_heads);
  const QueryTile tokens = query_tile(p.cu_seqlens_q, p.sequences, plan.tile_tokens, blockIdx.x);
  if (tokens.begin >= tokens.end) return;
  const DecodeTile tile{tokens, kv_head * group, group, static_cast<int>(tokens.end - tokens.begin) * group};
  const KeyRange range{p.visible(tokens.sequence, tokens.begin).begin, p.visible(tokens.sequence, tokens.end - 1).end};

  const int warp = threadIdx.x / kWarpSize;
  {
    DecodeRows<kHeadDim> rows;
    attend_keys(p, tile, kv_head, range, split_blocks(range, split, plan.splits), plan.rows / kDecodeTileRows, shared,
                rows);
    __syncthreads();  // the ring has been read: parts take its place
    store_part(rows, shared.parts + warp * kDecodeTileRows * kStride);
  }
  __syncthreads();

  // The parts of warps with the same rows, then those of the splits: a warp merges a row.
  const int64_t part_size = plan.rows * kStride, pair = blockIdx.x * p.num_kv_heads + kv_head;
  float* parts = workspace.parts + pair * plan.splits * part_size;
  for (int row = warp; row < tile.rows; row += kDecodeWarps) {
    const auto merged = merge_parts<kHeadDim>(shared.parts + row * kStride, kMaxDecodeRows / plan.rows, part_size);
    if (plan.splits == 1)
      store_result(merged, p.out + tile.offset(p, row));
    else
      store_merged(merged, parts + split * part_size + row * kStride);
  }
  if (plan.splits == 1 || !last_to_arrive(workspace.arrivals + pair, plan.splits, &shared.is_last)) return;
  for (int row = warp; row < tile.rows; row += kDecodeWarps)
    store_result(merge_parts<kHeadDim>(parts + row * kStride, plan.splits, part_size), p.out + tile.offset(p, row));
}

}  // namespace mixtral::cuda
