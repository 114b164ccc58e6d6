// The memory side of attention_prefill_hopper.cuh: shared memory, tensor maps, and the warps that fill the ring of keys
// and values and clean the values.
#pragma once

#include <cstdint>

#include "../../cuda/hopper_layout.h"
#include "../../cuda/kernel_hopper.cuh"
#include "../sliding_window_attention.h"
#include "attention_prefill_blocks_hopper.h"

namespace mixtral::cuda::prefill {

inline constexpr int kPrefillStages = 2, kPrefillThreads = 384, kHeadDim = 128;
inline constexpr int kComputeWarps = 8, kLoader = 8, kFirstCleaner = 9, kCleaners = 3;
// Named barriers: turns of the two warpgroups, each warpgroup alone, the cleaning warps.
inline constexpr int kTurnBarrier = 1, kWarpgroupBarrier = 3, kCleanersBarrier = 5;
inline constexpr int kHalfBytes = 128 * kSwizzleRowBytes;  // 128 rows, 64 of the 128 columns

struct PrefillShared {
  unsigned char q[2][kHalfBytes];  // halves of the columns; in the end the outputs
  unsigned char k[kPrefillStages][2][kHalfBytes], v[kPrefillStages][2][kHalfBytes];
  uint8_t spoilt[2 * kTileRows][kHeadDim / 4];  // [partly visible key]: a bit for each column, see clean_values
  int any_spoilt;
  Barrier q_full, k_full[kPrefillStages], k_empty[kPrefillStages];
  Barrier v_landed[kPrefillStages];  // of partly visible blocks: to be cleaned
  Barrier v_full[kPrefillStages], v_empty[kPrefillStages];
};

// Boxes of queries: [tokens, heads of a group, 64 columns], the rows of half a tile.
inline bool prefill_query_map(TensorMap* map, const AttentionProblem<BFloat16>& p) {
  const int group = static_cast<int>(p.num_heads / p.num_kv_heads), tokens = static_cast<int>(tile_tokens(group));
  return encode_tensor_map<3>(map, p.q, MapElement::kBFloat16, {kHeadDim, p.num_heads, p.tokens},
                              {kHeadDim * 2, p.num_heads * kHeadDim * 2}, {64, group, tokens});
}

// Boxes of keys or values: [a page, its successive rows, a head, 64 columns]; data [pages, page_size, Nkv, D].
inline bool prefill_key_map(TensorMap* map, const AttentionProblem<BFloat16>& p, const BFloat16* data) {
  const int64_t row_bytes = p.num_kv_heads * kHeadDim * 2;
  return encode_tensor_map<4>(
      map, data, MapElement::kBFloat16, {kHeadDim, p.num_kv_heads, p.keys.page_size, p.keys.pages},
      {kHeadDim * 2, row_bytes, p.keys.page_size * row_bytes}, {64, 1, static_cast<int>(box_keys(p.keys)), 1});
}

// The tile of a block, known to all its threads.
struct PrefillTile {
  QueryTile queries;
  PrefillKeys keys;
  int group, kv_head;
};

// ---- the loading warp

__device__ __forceinline__ void load_tile(const AttentionProblem<BFloat16>& p, const PrefillTile& tile,
                                          const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map,
                                          PrefillShared* shared) {
  const int lane = threadIdx.x % kWarpSize, half = lane % 2;
  const int box_rows = static_cast<int>(box_keys(p.keys)), first_row = lane / 2 * box_rows;
  const bool active = first_row < kBlockKeys;
  if (lane == 0) {
    const int rows = static_cast<int>(tile_tokens(tile.group)) * tile.group;
    arrive_expect_bytes(&shared->q_full, 2 * rows * kSwizzleRowBytes);
    for (int h = 0; h < 2; ++h) {
      load_box(shared->q[h], &q_map, &shared->q_full, h * 64, tile.kv_head * tile.group,
               static_cast<int>(tile.queries.begin), L2Policy::kEvictFirst);
    }
  }
  const auto load = [&](unsigned char(&tile_half)[kHalfBytes], const TensorMap& map, Barrier* full, Barrier* empty,
                        uint32_t parity, const KeyBox& box) {
    wait(empty, parity ^ 1);
    if (lane == 0) arrive_expect_bytes(full, 2 * kHalfBytes);
    __syncwarp();
    if (!active) return;
    load_box(tile_half + first_row * kSwizzleRowBytes, &map, full, half * 64, tile.kv_head, box.row, box.page);
  };
  // In the order of the products: K of block j + 1, then V of block j. The stage of the former is free earlier.
  RingPosition k_ring, v_ring;
  KeyBox box{0, 0};
  for (int block = 0; block <= tile.keys.blocks; ++block) {
    const KeyBox v_box = box;
    if (block < tile.keys.blocks) {
      const int64_t position = tile.keys.origin + block * kBlockKeys + first_row;
      if (active) box = key_box(p.keys, tile.queries.sequence, position);
      const int stage = k_ring.stage;
      load(shared->k[stage][half], k_map, &shared->k_full[stage], &shared->k_empty[stage], k_ring.parity, box);
      k_ring.advance(kPrefillStages);
    }
    if (block > 0) {
      const int stage = v_ring.stage;
      Barrier* full = tile.keys.partial(block - 1) ? &shared->v_landed[stage] : &shared->v_full[stage];
      load(shared->v[stage][half], v_map, full, &shared->v_empty[stage], v_ring.parity, v_box);
      v_ring.advance(kPrefillStages);
    }
  }
}

// ---- the cleaning warps

// Where the marks of a key lie that not all rows see: first those behind the window of the last row, then those ahead
// of the first row. Both kinds are fewer than the tokens of a tile.
__device__ __forceinline__ int mark_row(const PrefillKeys& keys, int key) {
  return key < keys.all_end ? key - keys.begin : kTileRows + key - keys.all_end;
}

// A key out of sight has the weight 0, but 0 times NaN is NaN. So in blocks that not all rows see whole, values that no
// row sees (stale, or of the next sequence) become zeros, and so do infinities and NaN that some rows see and others
// do not: those are marked, and their rows become NaN in the end (spoil_outputs).
__device__ __forceinline__ void clean_values(const PrefillTile& tile, PrefillShared* shared) {
  const PrefillKeys& keys = tile.keys;
  const int warp = threadIdx.x / kWarpSize - kFirstCleaner, lane = threadIdx.x % kWarpSize;  // columns 4 lane .. + 3
  RingPosition ring;
  uint32_t parities = 0;  // of v_landed, a bit each: phases are the partial blocks alone
  for (int block = 0; block < keys.blocks; ++block, ring.advance(kPrefillStages)) {
    if (!keys.partial(block)) continue;
    wait(&shared->v_landed[ring.stage], parities >> ring.stage & 1);
    parities ^= 1u << ring.stage;
    for (int row = warp; row < kBlockKeys; row += kCleaners) {
      const int key = block * kBlockKeys + row;
      if (key >= keys.all_begin && key < keys.all_end) continue;
      auto* values = reinterpret_cast<uint2*>(shared->v[ring.stage][lane / 16] +
                                              swizzle_128b(row * kSwizzleRowBytes + lane % 16 * 8));
      if (key < keys.begin || key >= keys.end) {
        *values = uint2{0, 0};
        continue;
      }
      uint32_t words[2] = {values->x, values->y}, marks = 0;
      for (int i = 0; i < 4; ++i) {
        const uint32_t exponent = 0x7F80u << i % 2 * 16;
        if ((words[i / 2] & exponent) != exponent) continue;
        words[i / 2] &= ~(0xFFFFu << i % 2 * 16);
        marks |= 1u << i;
      }
      shared->spoilt[mark_row(keys, key)][lane] = static_cast<uint8_t>(marks);
      if (marks == 0) continue;
      *values = uint2{words[0], words[1]};
      shared->any_spoilt = 1;
    }
    fence_async_proxy();
    named_barrier_sync(kCleanersBarrier, kCleaners * kWarpSize);
    if (warp == 0 && lane == 0) arrive(&shared->v_full[ring.stage]);
  }
}

}  // namespace mixtral::cuda::prefill
