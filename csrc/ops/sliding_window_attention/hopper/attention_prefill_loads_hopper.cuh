// The memory side of attention_prefill_hopper.cuh: shared memory, tensor maps, and the warps that fill the ring of keys
// and values and clean the values.
//
// The loading warp hands out the tiles, too. It runs ahead into the next tile: while the last blocks of one are
// multiplied, the queries and first keys of the next one arrive. Only the first tile of a block waits for its loads.
#pragma once

#include <cstdint>

#include "../../cuda/hopper_layout.h"
#include "../../cuda/kernel_hopper.cuh"
#include "../sliding_window_attention.h"
#include "attention_prefill_blocks_hopper.h"

namespace mixtral::cuda::prefill {

inline constexpr int kPrefillStages = 2, kTileStages = 2, kPrefillThreads = 384, kHeadDim = 128;
inline constexpr int kComputeWarps = 8, kLoader = 8, kFirstCleaner = 9, kCleaners = 3;
// Named barriers: turns of the two warpgroups, each warpgroup alone, the cleaning warps.
inline constexpr int kTurnBarrier = 1, kWarpgroupBarrier = 3, kCleanersBarrier = 5;
inline constexpr int kHalfBytes = 128 * kSwizzleRowBytes;  // 128 rows, 64 of the 128 columns

// A tile as the loading warp finds it; tokens 0: there are no more.
struct PrefillTile {
  PrefillKeys keys;
  int64_t sequence, first_position, length;  // of the first query in its sequence; keys of the sequence
  int first_token, tokens, kv_head;
};

struct PrefillShared {
  unsigned char q[kTileStages][2][kHalfBytes];  // halves of the columns; in the end the outputs
  unsigned char k[kPrefillStages][2][kHalfBytes], v[kPrefillStages][2][kHalfBytes];
  uint8_t spoilt[kTileStages][2 * kTileRows][kHeadDim / 4];  // [partly visible key]: a bit for each column
  int any_spoilt[kTileStages];
  PrefillTile tiles[kTileStages];
  Barrier q_full[kTileStages], q_empty[kTileStages];  // of tiles, queries and marks
  Barrier k_full[kPrefillStages], k_empty[kPrefillStages];
  Barrier v_landed[kPrefillStages];  // of partly visible blocks: to be cleaned
  Barrier v_full[kPrefillStages], v_empty[kPrefillStages];
};
static_assert(sizeof(PrefillShared) <= 227 << 10);

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

__device__ __forceinline__ void init_barriers(PrefillShared* shared) {
  for (int stage = 0; stage < kTileStages; ++stage) {
    init_barrier(&shared->q_full[stage], 1);
    init_barrier(&shared->q_empty[stage], kComputeWarps + kCleaners);
  }
  for (int stage = 0; stage < kPrefillStages; ++stage) {
    init_barrier(&shared->k_full[stage], 1);
    init_barrier(&shared->k_empty[stage], kComputeWarps);
    init_barrier(&shared->v_landed[stage], 1);
    init_barrier(&shared->v_full[stage], 1);
    init_barrier(&shared->v_empty[stage], kComputeWarps);
  }
  fence_barrier_init();
}

__device__ __forceinline__ void release(Barrier* empty) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) arrive(empty);
}

// ---- the loading warp

// Items run from the last tile of the first key/value head, which has the most keys where there is no window, to its
// first tile, then on to the next head: tiles that run at a time share keys in L2, and the last ones are short.
__device__ __forceinline__ PrefillTile prefill_tile(const AttentionProblem<BFloat16>& p, const PrefillPlan& plan,
                                                    int item) {
  PrefillTile tile;
  tile.kv_head = static_cast<int>(static_cast<unsigned>(item) / static_cast<unsigned>(plan.tiles));
  const int number = plan.tiles - 1 - (item - tile.kv_head * plan.tiles);
  const QueryTile queries = prefill_query_tile(p.cu_seqlens_q, p.sequences, p.tokens, plan.tile_tokens, number);
  tile.sequence = queries.sequence;
  tile.tokens = p.holds(queries) ? static_cast<int>(queries.end - queries.begin) : 0;
  tile.first_token = static_cast<int>(queries.begin);
  tile.length = p.keys.length(queries.sequence);
  tile.first_position = queries.begin - p.cu_seqlens_q[queries.sequence + 1] + tile.length;
  tile.keys = prefill_keys(visible_keys(tile.first_position, tile.length, p.window, p.causal),
                           visible_keys(tile.first_position + tile.tokens - 1, tile.length, p.window, p.causal));
  return tile;
}

// The item behind `item` for this block: whichever block is ready takes the next one. Without a counter (null) each
// block has a fixed share.
__device__ __forceinline__ int next_item(int item, int* taken) {
  if (!taken) return item + static_cast<int>(gridDim.x);
  int count = 0;
  if (threadIdx.x % kWarpSize == 0) count = atomicAdd(taken, 1);
  return static_cast<int>(gridDim.x) + __shfl_sync(0xffffffffu, count, 0);
}

// Every block has taken all it will: the last one to say so leaves the counters clear for the next launch.
__device__ __forceinline__ void clear_counters(int* counters) {
  if (!counters || threadIdx.x % kWarpSize != 0) return;
  if (atomicAdd(counters + 1, 1) != static_cast<int>(gridDim.x) - 1) return;
  counters[0] = 0;
  counters[1] = 0;
}

// Hands a tile to the other warps and starts the copy of its queries; null: there are no more tiles.
__device__ __forceinline__ void start_tile(const PrefillTile* tile, const PrefillPlan& plan, const TensorMap& q_map,
                                           PrefillShared* shared, RingPosition& ring) {
  const int stage = ring.stage;
  wait(&shared->q_empty[stage], ring.parity ^ 1);
  if (threadIdx.x % kWarpSize == 0) {
    shared->any_spoilt[stage] = 0;
    if (tile) {
      shared->tiles[stage] = *tile;
    } else {
      shared->tiles[stage].tokens = 0;
    }
    if (tile && tile->keys.blocks > 0) {
      const int rows = plan.tile_tokens * plan.group;
      arrive_expect_bytes(&shared->q_full[stage], 2 * rows * kSwizzleRowBytes);
      for (int h = 0; h < 2; ++h) {
        load_box(shared->q[stage][h], &q_map, &shared->q_full[stage], h * 64, tile->kv_head * plan.group,
                 tile->first_token, L2Policy::kEvictFirst);
      }
    } else {
      arrive(&shared->q_full[stage]);
    }
  }
  ring.advance(kTileStages);
}

struct KeyRings {
  RingPosition k, v;  // carried from tile to tile
};

__device__ __forceinline__ void load_keys(const AttentionProblem<BFloat16>& p, const PrefillPlan& plan,
                                          const PrefillTile& tile, const TensorMap& k_map, const TensorMap& v_map,
                                          PrefillShared* shared, KeyRings& rings) {
  const int lane = threadIdx.x % kWarpSize, half = lane % 2;
  const int box_rows = static_cast<int>(box_keys(p.keys)), first_row = lane / 2 * box_rows;
  const bool active = first_row < kBlockKeys;
  const auto load = [&](unsigned char(&tile_half)[kHalfBytes], const TensorMap& map, Barrier* full, Barrier* empty,
                        uint32_t parity, const KeyBox& box) {
    wait(empty, parity ^ 1);
    if (lane == 0) arrive_expect_bytes(full, 2 * kHalfBytes);
    __syncwarp();
    if (!active) return;
    load_box(tile_half + first_row * kSwizzleRowBytes, &map, full, half * 64, tile.kv_head, box.row, box.page);
  };
  // In the order of the products: K of block j + 1, then V of block j. The stage of the former is free earlier.
  KeyBoxes boxes(p.keys, plan, tile.sequence, tile.keys.origin + (active ? first_row : 0));
  KeyBox box{0, 0};
  for (int block = 0; block <= tile.keys.blocks; ++block) {
    const KeyBox v_box = box;
    if (block < tile.keys.blocks) {
      box = boxes.next();
      const int stage = rings.k.stage;
      load(shared->k[stage][half], k_map, &shared->k_full[stage], &shared->k_empty[stage], rings.k.parity, box);
      rings.k.advance(kPrefillStages);
    }
    if (block > 0) {
      const int stage = rings.v.stage;
      Barrier* full = tile.keys.partial(block - 1) ? &shared->v_landed[stage] : &shared->v_full[stage];
      load(shared->v[stage][half], v_map, full, &shared->v_empty[stage], rings.v.parity, v_box);
      rings.v.advance(kPrefillStages);
    }
  }
}

// The tiles of a block, the one of item blockIdx.x first. counters: as launch_counters gives them, or null.
__device__ __forceinline__ void load_tiles(const AttentionProblem<BFloat16>& p, const PrefillPlan& plan,
                                           const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map,
                                           int* counters, PrefillTile tile, PrefillShared* shared) {
  RingPosition ring;
  KeyRings rings;
  for (int item = static_cast<int>(blockIdx.x);;) {
    if (tile.tokens > 0) {
      start_tile(&tile, plan, q_map, shared, ring);
      if (tile.keys.blocks > 0) load_keys(p, plan, tile, k_map, v_map, shared, rings);
    }
    item = next_item(item, counters);
    if (item >= plan.items) break;
    tile = prefill_tile(p, plan, item);
  }
  start_tile(nullptr, plan, q_map, shared, ring);
  clear_counters(counters);
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
//
// parities: of v_landed, a bit each, since its phases are the partial blocks alone.
__device__ __forceinline__ void clean_values(const PrefillKeys& keys, PrefillShared* shared, int tile_stage,
                                             RingPosition& ring, uint32_t& parities) {
  const int warp = threadIdx.x / kWarpSize - kFirstCleaner, lane = threadIdx.x % kWarpSize;  // columns 4 lane .. + 3
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
      shared->spoilt[tile_stage][mark_row(keys, key)][lane] = static_cast<uint8_t>(marks);
      if (marks == 0) continue;
      *values = uint2{words[0], words[1]};
      shared->any_spoilt[tile_stage] = 1;
    }
    fence_async_proxy();
    named_barrier_sync(kCleanersBarrier, kCleaners * kWarpSize);
    if (warp == 0 && lane == 0) arrive(&shared->v_full[ring.stage]);
  }
}

__device__ __forceinline__ void clean_tiles(PrefillShared* shared) {
  RingPosition ring;
  uint32_t parities = 0;
  for (RingPosition at;; at.advance(kTileStages)) {
    wait(&shared->q_full[at.stage], at.parity);
    if (shared->tiles[at.stage].tokens == 0) return;
    clean_values(shared->tiles[at.stage].keys, shared, at.stage, ring, parities);
    release(&shared->q_empty[at.stage]);
  }
}

}  // namespace mixtral::cuda::prefill
