// Attention of few query tokens per sequence (decoding, short chunks), bf16, over packed or paged keys.
//
// A block serves one tile of query rows (pairs of token and query head of one key/value head) and one share of the
// keys: grid (query tiles, Nkv, splits), 4 warps. Blocks of 64 keys pass through a ring of 3 stages. Per stage each
// warp copies 16 keys and values and multiplies 16 of them by its 16 rows: S = Q K^T, online softmax, O += P V, with
// mma m16n8k16. With 16 rows a block the warps share the keys, with 64 the rows, with 32 both; the warps of the same
// rows merge their parts in the order of the warps. So do the splits: the last block of a tile to arrive merges their
// parts from global memory, in order, whichever block that is. No block waits for another one.
//
// A row's bits depend on the range of keys that its tile sees and on the plan (decode_plan), which follows from shapes:
// T, B, heads, window, page columns. They are the same at every run, not in every batch; the simple kernels are
// batch-invariant.
//
// Roofline: 512 bytes of K and V per key and key/value head (D = 128), 4 * 128 FLOP per row: with 16 rows 16 FLOP a
// byte, against 295 that the tensor cores of an H100 could do. Memory is the bound: B = 1, 8 heads, 4096 keys: 16.8 MB,
// 5.0 us at 3.35 TB/s (H200, 4.8 TB/s: 3.5 us).
//
// Bytes in flight: Little's law asks for 3.35 TB/s * 1 us / 132 = 25 KB per multiprocessor. A block keeps at least two
// stages of 32 KB ahead. Two blocks fit a multiprocessor (97 KB of shared memory and 128 * 184 registers each): one
// streams while the other starts or merges.
//
// Copies are cp.async: rows of 256 bytes, from pages of any size. Keys out of sight, or on no page of the pool, become
// zeros without a read: what a stale slot holds never enters. A key's row is looked up one block before its copy.
// Wgmma would need 64 rows, and its operands from TMA, which knows no page table.
//
// Issue: some 750 instructions a warp and stage of 64 keys (SASS of the main loop, 16 rows, D = 128): 240 copy, 110
// look up a row (three divisions), 40 feed the tensor cores, the rest is softmax and addresses. That is 47 a key, a
// third of the 2200 cycles in which a multiprocessor's share of the bandwidth brings a stage.
#pragma once

#include "../../cuda/kernel_hopper.cuh"  // cp.async
#include "attention_decode_rows_hopper.cuh"

namespace mixtral::cuda {

inline constexpr int kDecodeThreads = 128, kDecodeWarps = kDecodeKeys / kChunkKeys, kDecodeStages = 3;

template <int kHeadDim>
struct DecodeShared {
  struct Stage {
    unsigned char keys[kDecodeKeys * kHeadDim * 2], values[kDecodeKeys * kHeadDim * 2];
  };
  union {
    Stage ring[kDecodeStages];
    float parts[kMaxDecodeRows * decode_part_stride(kHeadDim)];  // of the four warps, after the last key
  };
  int is_last;
};

// Starts the copies of 16 keys and values. offset: of the key lane % 16 in k and v; negative: zeros.
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

// A merged row of the result: lane l of a warp has columns from l * kHeadDim / 32 on.
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

// Whether this block is the last one to say that its part is written; if so, it sees all of them, and the counter is 0
// again for the next launch.
__device__ __forceinline__ bool last_to_arrive(int* arrivals, int blocks, int* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const bool last = atomicAdd(arrivals, 1) == blocks - 1;
    if (last) *arrivals = 0;
    *shared = last;
    __threadfence();
  }
  __syncthreads();
  return *shared;
}

// Updates the rows of this warp with the keys of this split.
template <int kHeadDim>
__device__ __forceinline__ void attend_keys(const DecodeProblem& p, const DecodeTile& tile, int64_t kv_head,
                                            const KeyRange& range, const KeyBlocks& blocks, int row_tiles,
                                            DecodeShared<kHeadDim>& shared, DecodeRows<kHeadDim>& rows) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_blocks = static_cast<int>(blocks.end - blocks.begin);
  // Offset of the key of this thread in k and v; negative if there is none. Looked up one key block before its copy,
  // since that needs a load.
  const auto offset_in_block = [&](int block) -> int64_t {
    const int64_t key = (blocks.begin + block) * kDecodeKeys + warp * kChunkKeys + lane % kChunkKeys;
    if (block >= num_blocks || key < range.begin || key >= range.end) return -1;
    return (p.keys.row(tile.tokens.sequence, key) * p.num_kv_heads + kv_head) * kHeadDim;
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
  start_behind_previous_kernel();
  constexpr int kStride = decode_part_stride(kHeadDim);
  auto& shared = *reinterpret_cast<DecodeShared<kHeadDim>*>(dynamic_shared_memory());
  const int64_t kv_head = blockIdx.y;
  const int split = blockIdx.z, group = static_cast<int>(p.num_heads / p.num_kv_heads);
  const QueryTile tokens = query_tile(p.cu_seqlens_q, p.sequences, plan.tile_tokens, blockIdx.x);
  if (!p.holds(tokens)) return;
  const DecodeTile tile{tokens, kv_head * group, group, static_cast<int>(tokens.end - tokens.begin) * group};
  const KeyRange range{p.visible(tokens.sequence, tokens.begin).begin, p.visible(tokens.sequence, tokens.end - 1).end};

  const int warp = threadIdx.x / kWarpSize;
  {
    DecodeRows<kHeadDim> rows;
    attend_keys(p, tile, kv_head, range, split_blocks(range, split, plan.splits), plan.rows / kDecodeTileRows, shared,
                rows);
    __syncthreads();  // the ring has been read: parts now use its memory
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
