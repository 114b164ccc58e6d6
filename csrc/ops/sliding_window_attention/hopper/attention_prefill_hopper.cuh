// Attention of many queries on Hopper, bf16, head dim 128, keys packed or in pages. After Shah et al.,
// "FlashAttention-3" (2024).
//
// A tile is 128 rows (tokens x query heads of one key/value head, attention_prefill_blocks_hopper.h) against blocks of
// 128 keys, which pass through a ring of two stages. One block on each multiprocessor takes tiles until there are no
// more: whichever is ready takes the next one. Its warps:
//   0-3, 4-7   two warpgroups, 64 rows each: S = Q K^T (wgmma from shared memory), online softmax in registers, and
//              O += P V with P from registers: the accumulator of S, rounded, is the fragment of P.
//   8, 9-11    load and hand out tiles, and clean values that not all rows see (attention_prefill_loads_hopper.cuh).
// S of block j and O of block j - 1 are issued together, and the softmax of block j runs while O is computed. The
// warpgroups take turns in issuing: the softmax of one falls into the products of the other. Turns go on from tile to
// tile: one warpgroup stores its rows while the other multiplies. The tile and the queries of the next one, and its
// first keys, are there by then; so the search for a tile and the first copies cost time once a launch, not once a
// tile.
//
// Memory: 2 tiles x (Q 32 + marks 8) KB + 2 stages x (K 32 + V 32) KB = 208 KB. Registers: 232 for each of 256 threads
// (64 hold S, 64 O, 32 P), 40 for 128.
// Bound, per tile and block of keys: 8.4 MFLOP take the tensor cores 2048 clocks. A warp has 524 other instructions
// (SASS; with a mask 751), two warps a scheduler: 1048 clocks of issue. 66 of them are exponentials and their like at 4
// lanes a clock and scheduler: 1056 clocks. So the tensor cores are the bound as long as turns keep them fed: the
// softmax of one warpgroup, some 800 clocks, against 1024 of products of the other. K and V are 64 KB, 32 bytes a clock
// from L2; tiles of one key/value head run next to each other and share them there.
//
// A row's bits depend on its own query and keys alone: blocks of keys lie at absolute positions and come in rising
// order, and one of which a row sees nothing multiplies its sums by one and adds zeros.
#pragma once

#include <cstdint>

#include "../../cuda/kernel_hopper.cuh"
#include "attention_prefill_loads_hopper.cuh"

namespace mixtral::cuda::prefill {

// The two rows of a thread: the keys they see, and their softmax.
struct PrefillRows {
  int begin[2], end[2];  // keys, relative to the tile's first block
  float max[2], sum[2];  // of the scaled scores, in base 2; the sum is over this thread's keys alone
};

// scores [64, 128] = the warpgroup's q [64, 128] times k [128, 128]; q and k: first of two halves of the depth
__device__ __forceinline__ void multiply_scores(float (&scores)[kBlockKeys / 2], uint32_t q, uint32_t k) {
  fence_accumulators();
#pragma unroll
  for (int depth = 0; depth < kHeadDim; depth += 16) {
    const uint32_t offset = depth / 64 * kHalfBytes + depth % 64 * 2;
    multiply_bf16<kBlockKeys>(scores, matrix_descriptor(q + offset), matrix_descriptor(k + offset), depth > 0);
  }
  commit_products();
}

// outputs [64, 128] += weights [64, 128 keys] times v [128 keys, 128 columns]; v: first of two halves of the columns
__device__ __forceinline__ void multiply_values(float (&outputs)[kHeadDim / 2], const uint32_t (&weights)[8][4],
                                                uint32_t v) {
  fence_accumulators();
#pragma unroll
  for (int step = 0; step < kBlockKeys / 16; ++step) {
    const uint32_t keys = v + step * 16 * kSwizzleRowBytes;
    multiply_bf16<kHeadDim, true>(outputs, weights[step], matrix_descriptor(keys, kSwizzleAtomBytes, kHalfBytes), true);
  }
  commit_products();
}

__device__ __forceinline__ void mask_scores(float (&scores)[kBlockKeys / 2], const PrefillRows& rows, int block) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < kBlockKeys / 2; ++i) {
    const int key = block * kBlockKeys + accumulator_column(thread, i), h = i / 2 % 2;
    if (key < rows.begin[h] || key >= rows.end[h]) scores[i] = -INFINITY;
  }
}

// Scores become weights; correction: the factor for the sums so far, exactly 1 while the maximum stays.
__device__ __forceinline__ void softmax_block(float (&scores)[kBlockKeys / 2], float scale, PrefillRows& rows,
                                              float (&correction)[2]) {
  float top[2] = {-INFINITY, -INFINITY}, origin[2];
#pragma unroll
  for (int i = 0; i < kBlockKeys / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], scores[i]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // Four neighbouring lanes share a row.
    for (int lanes = 1; lanes < 4; lanes *= 2) top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], lanes));
    const float max = fmaxf(rows.max[h], top[h] * scale);
    origin[h] = max == -INFINITY ? 0.0f : max;  // nothing seen so far: all weights are 2^-inf
    correction[h] = exp2_approx(rows.max[h] - origin[h]);
    rows.max[h] = max;
    rows.sum[h] *= correction[h];
  }
#pragma unroll
  for (int i = 0; i < kBlockKeys / 2; ++i) {
    scores[i] = exp2_approx(fmaf(scores[i], scale, -origin[i / 2 % 2]));
    rows.sum[i / 2 % 2] += scores[i];
  }
}

// An accumulator [64, 128] in bf16: fragments of 16 columns, as products and stmatrix take them.
__device__ __forceinline__ void pack_fragments(const float (&values)[64], uint32_t (&fragments)[8][4]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) fragments[i / 4][i % 4] = pack_bf16(values[2 * i], values[2 * i + 1]);
}

// outputs: the sums of a thread's rows over all blocks of keys (at least one). ring: of the first block, then behind
// the last one; keys and values are one block apart in it.
__device__ __forceinline__ void attend_blocks(const PrefillKeys& keys, float scale, const unsigned char* queries,
                                              PrefillShared* shared, RingPosition& ring, PrefillRows& rows,
                                              float (&outputs)[kHeadDim / 2]) {
  const int warpgroup = threadIdx.x / 128;
  const int my_turn = kTurnBarrier + warpgroup, others_turn = kTurnBarrier + 1 - warpgroup;
  const uint32_t q = shared_address(queries) + warpgroup * 64 * kSwizzleRowBytes;
  float scores[kBlockKeys / 2], correction[2];
  uint32_t weights[kBlockKeys / 16][4];
  RingPosition k_ring = ring, v_ring = ring;  // v_ring: one block behind
  // After the products with V in flight: the weights of the next ones, and the sums relative to the new maximum.
  const auto next_weights = [&] {
    wait_products<0>(outputs);
    for (int i = 0; i < kHeadDim / 2; ++i) outputs[i] *= correction[i / 2 % 2];
    pack_fragments(scores, weights);
  };

  wait(&shared->k_full[k_ring.stage], k_ring.parity);
  named_barrier_sync(my_turn, 256);
  multiply_scores(scores, q, shared_address(shared->k[k_ring.stage]));
  named_barrier_arrive(others_turn, 256);
  wait_products<0>(scores);
  release(&shared->k_empty[k_ring.stage]);
  if (keys.partial(0)) mask_scores(scores, rows, 0);
  softmax_block(scores, scale, rows, correction);

  for (int block = 1; block < keys.blocks; ++block) {
    k_ring.advance(kPrefillStages);
    // First, and not only because K comes first: within straight code ptxas moves the softmax behind the wait for the
    // products that are to run meanwhile; it does not move it behind a loop.
    wait(&shared->k_full[k_ring.stage], k_ring.parity);
    next_weights();
    if (block > 1) {
      release(&shared->v_empty[v_ring.stage]);
      v_ring.advance(kPrefillStages);
    }
    named_barrier_sync(my_turn, 256);
    multiply_scores(scores, q, shared_address(shared->k[k_ring.stage]));
    wait(&shared->v_full[v_ring.stage], v_ring.parity);
    multiply_values(outputs, weights, shared_address(shared->v[v_ring.stage]));
    named_barrier_arrive(others_turn, 256);
    wait_products<1>(scores);
    release(&shared->k_empty[k_ring.stage]);
    if (keys.partial(block)) mask_scores(scores, rows, block);
    softmax_block(scores, scale, rows, correction);
  }

  wait(&shared->v_full[k_ring.stage], k_ring.parity);  // of the last block
  next_weights();
  if (keys.blocks > 1) release(&shared->v_empty[v_ring.stage]);
  multiply_values(outputs, weights, shared_address(shared->v[k_ring.stage]));
  wait_products<0>(outputs);
  release(&shared->v_empty[k_ring.stage]);
  k_ring.advance(kPrefillStages);
  ring = k_ring;
}

// The columns where a row sees a marked value: a NaN (clean_values).
__device__ __forceinline__ void spoil_outputs(const PrefillKeys& keys, const PrefillRows& rows,
                                              const uint8_t (*spoilt)[kHeadDim / 4], float (&outputs)[kHeadDim / 2]) {
  for (int key = keys.begin; key < keys.end; ++key) {
    if (key >= keys.all_begin && key < keys.all_end) continue;
    const uint8_t* marks = spoilt[mark_row(keys, key)];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      const int column = accumulator_column(threadIdx.x % 128, i), h = i / 2 % 2;
      const bool spoilt = marks[column / 4] >> column % 4 & 1;
      if (spoilt && key >= rows.begin[h] && key < rows.end[h]) outputs[i] = NAN;
    }
  }
}

// outputs in bf16 to out, through the place of the queries: whole rows of 256 bytes.
__device__ __forceinline__ void store_outputs(const AttentionProblem<BFloat16>& p, const PrefillPlan& plan,
                                              const PrefillTile& tile, unsigned char (&queries)[2][kHalfBytes],
                                              const float (&outputs)[kHeadDim / 2]) {
  const int lane = threadIdx.x % kWarpSize, first_row = threadIdx.x / kWarpSize * 16;  // of the warp
  uint32_t fragments[8][4];
  pack_fragments(outputs, fragments);
  const auto at = [&](int row, int chunk) {  // 16-byte chunk of a row
    return queries[chunk / 8] + swizzle_128b(row * kSwizzleRowBytes + chunk % 8 * 16);
  };
  named_barrier_sync(kWarpgroupBarrier + threadIdx.x / 128, 128);  // the warpgroup's products with q are done
#pragma unroll
  for (int i = 0; i < 8; ++i) store_matrices(at(first_row + lane % 16, 2 * i + lane / 16), fragments[i]);
  __syncwarp();
  for (int i = lane; i < 16 * 16; i += kWarpSize) {
    const int row = first_row + i / 16, chunk = i % 16, token = plan.row_token(row);
    if (token >= tile.tokens) continue;
    const int64_t head = tile.kv_head * plan.group + row - token * plan.group;
    *reinterpret_cast<uint4*>(p.out + ((tile.first_token + token) * p.num_heads + head) * kHeadDim + chunk * 8) =
        *reinterpret_cast<const uint4*>(at(row, chunk));
  }
  fence_async_proxy();  // TMA overwrites them next
}

__device__ __forceinline__ void compute_tile(const AttentionProblem<BFloat16>& p, const PrefillPlan& plan, int stage,
                                             PrefillShared* shared, RingPosition& ring) {
  constexpr float kLog2E = 1.4426950408889634f;
  const PrefillTile& tile = shared->tiles[stage];
  const PrefillKeys keys = tile.keys;
  PrefillRows rows;
  for (int h = 0; h < 2; ++h) {
    const int token = plan.row_token(threadIdx.x / 128 * 64 + accumulator_row(threadIdx.x % 128, 2 * h));
    const KeyRange none{keys.origin, keys.origin};
    const KeyRange seen =
        token < tile.tokens ? visible_keys(tile.first_position + token, tile.length, p.window, p.causal) : none;
    rows.begin[h] = static_cast<int>(seen.begin - keys.origin);
    rows.end[h] = static_cast<int>(seen.end - keys.origin);
    rows.max[h] = -INFINITY;
    rows.sum[h] = 0.0f;
  }
  float outputs[kHeadDim / 2] = {};
  if (keys.blocks > 0) attend_blocks(keys, p.scale * kLog2E, shared->q[stage][0], shared, ring, rows, outputs);
  if (shared->any_spoilt[stage]) spoil_outputs(keys, rows, shared->spoilt[stage], outputs);
  float inverse[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int lanes = 1; lanes < 4; lanes *= 2) rows.sum[h] += __shfl_xor_sync(0xffffffffu, rows.sum[h], lanes);
    inverse[h] = rows.sum[h] == 0.0f ? 0.0f : 1.0f / rows.sum[h];  // 0: no key was seen
  }
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) outputs[i] *= inverse[i / 2 % 2];
  store_outputs(p, plan, tile, shared->q[stage], outputs);
}

// Warpgroup 0 has the first turn. In the end it has one too many, for every arrival needs a wait.
__device__ __forceinline__ void compute_tiles(const AttentionProblem<BFloat16>& p, const PrefillPlan& plan,
                                              PrefillShared* shared) {
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 1) named_barrier_arrive(kTurnBarrier, 256);
  RingPosition ring;
  for (RingPosition at;; at.advance(kTileStages)) {
    wait(&shared->q_full[at.stage], at.parity);
    if (shared->tiles[at.stage].tokens == 0) break;
    compute_tile(p, plan, at.stage, shared, ring);
    release(&shared->q_empty[at.stage]);
  }
  if (warpgroup == 0) named_barrier_sync(kTurnBarrier, 256);
}

// Grid: one block per multiprocessor, or as many as there are items. counters: two, 0 before and after, or null.
__global__ void __launch_bounds__(kPrefillThreads, 1)
    attention_prefill_hopper_kernel(const __grid_constant__ AttentionProblem<BFloat16> p,
                                    const __grid_constant__ PrefillPlan plan, const __grid_constant__ TensorMap q_map,
                                    const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                                    int* counters) {
  auto* shared = reinterpret_cast<PrefillShared*>(dynamic_shared_memory());
  const int warp = threadIdx.x / kWarpSize;
  if (warp >= kComputeWarps) {
    decrease_registers<40>();
    if (warp >= kFirstCleaner) {
      __syncthreads();
      clean_tiles(shared);
      return;
    }
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) {
      prefetch_tensor_map(&q_map);
      prefetch_tensor_map(&k_map);
      prefetch_tensor_map(&v_map);
    }
    const PrefillTile tile = prefill_tile(p, plan, static_cast<int>(blockIdx.x));
    if (lane == 0) init_barriers(shared);
    __syncthreads();
    load_tiles(p, plan, q_map, k_map, v_map, counters, tile, shared);
  } else {
    increase_registers<232>();
    __syncthreads();
    compute_tiles(p, plan, shared);
  }
}

}  // namespace mixtral::cuda::prefill
