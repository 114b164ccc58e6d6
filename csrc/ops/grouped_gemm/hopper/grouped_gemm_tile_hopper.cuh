// grouped_gemm for many rows in bf16 on Hopper, plain or with swiglu: TMA feeds wgmma through a ring in shared memory.
//
// Who computes what: one block of 384 threads on every SM walks over the tiles of 128 rows x 256 columns. Of its first
// warpgroup one thread loads, running ahead of the products by up to four steps of 64 depths, into the next tile as
// well, so that storing a tile overlaps with loading the next. The other two warpgroups multiply 64 rows each by all
// 256 columns: the largest product of wgmma, 128 f32 sums a thread. With swiglu the 256 columns are 128 of gate and the
// 128 of up that belong to them, so that one thread holds both halves of a value, as sums i and i + 64.
//
// Rows of groups are compact: a tile may load rows of the next group, or zeros after the last row and the last column.
// Their sums are never stored, and a warpgroup without rows in a tile skips it. A warp brings its sums through 2 KB
// of shared memory into rows of 128 bytes that it stores 16 bytes a thread; only the threads of a warp wait for each
// other.
//
// Shared memory: 4 stages of (128 + 256) * 128 bytes = 192 KB, 8 warps * 2 KB to store = 16 KB, of 227 KB.
// Registers: 128 * 40 for the loading warpgroup and 256 * 232 for the others: what 384 * 168 at the launch are.
//
// Roofline: 2 M N K FLOP at 989 TFLOP/s; E N K + M K + M N values of 2 bytes at 3.35 TB/s. Computing bounds it from
// about 300 rows a group on. A step of a tile is 1024 cycles of products for 48 KB, 48 bytes a cycle from L2; the
// order of the tiles (tiles.h) has most of them read there. A smaller tile would need more bytes for each product.
#pragma once

#include <cstdint>

#include "../../cuda/hopper_layout.h"
#include "../../cuda/kernel_hopper.cuh"
#include "../grouped_gemm.h"
#include "../tiles.h"
#include "swiglu_pair_hopper.cuh"

namespace mixtral::cuda {

inline constexpr int kGemmRows = 128, kGemmColumns = 256, kGemmDepth = 64, kGemmStages = 4;
inline constexpr int kGemmThreads = 384, kGemmWarps = 8;   // warps that multiply
inline constexpr int kStoreRows = 16, kStoreColumns = 64;  // a warp stores so many at a time

struct alignas(kSwizzleAtomBytes) GemmShared {
  unsigned char a[kGemmStages][kGemmRows * kSwizzleRowBytes];
  unsigned char b[kGemmStages][kGemmColumns * kSwizzleRowBytes];
  unsigned char out[kGemmWarps][kStoreRows * kSwizzleRowBytes];
  Barrier full[kGemmStages], empty[kGemmStages];
};

// Boxes of a [M, K], and of half a tile's columns of b [E, N, K]. False where TMA cannot copy them.
inline bool encode_gemm_maps(const GroupedGemm<BFloat16>& gemm, TensorMap* a, TensorMap* b) {
  const int64_t experts = gemm.b.experts, columns = gemm.b.columns, depth = gemm.b.depth, row_bytes = depth * 2;
  return encode_tensor_map<2>(a, gemm.a, MapElement::kBFloat16, {depth, gemm.rows}, {row_bytes},
                              {kGemmDepth, kGemmRows}) &&
         encode_tensor_map<3>(b, gemm.b.data, MapElement::kBFloat16, {depth, columns, experts},
                              {row_bytes, columns * row_bytes}, {kGemmDepth, kGemmColumns / 2, 1});
}

// Columns of out, and how many of them are in a tile.
template <bool kSwiglu>
__device__ __forceinline__ int64_t out_columns(const GroupedGemm<BFloat16>& gemm) {
  return kSwiglu ? gemm.b.columns / 2 : gemm.b.columns;
}
template <bool kSwiglu>
inline constexpr int kOutColumns = kSwiglu ? kGemmColumns / 2 : kGemmColumns;

// Tile `index` of all blocks' tiles, and its steps along the depth: none for rows after the last group.
template <bool kSwiglu>
__device__ __forceinline__ GemmTile gemm_tile(const GroupedGemm<BFloat16>& gemm, int64_t index) {
  return find_gemm_tile(gemm.offs, gemm.b.experts, gemm.rows, kGemmRows,
                        ceil_div(out_columns<kSwiglu>(gemm), kOutColumns<kSwiglu>), index);
}
__device__ __forceinline__ int gemm_steps(const GroupedGemm<BFloat16>& gemm, const GemmTile& tile) {
  return tile.expert == gemm.b.experts ? 0 : static_cast<int>(ceil_div(gemm.b.depth, kGemmDepth));
}

// One thread: all tiles of this block into the ring. a [M, K], b [E, N, K]
template <bool kSwiglu>
__device__ __forceinline__ void load_tiles(const TensorMap& a, const TensorMap& b, const GroupedGemm<BFloat16>& gemm,
                                           GemmShared& shared) {
  prefetch_tensor_map(&a);
  prefetch_tensor_map(&b);
  RingPosition ring;
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    const GemmTile tile = gemm_tile<kSwiglu>(gemm, index);
    if (tile.expert < 0) return;
    const int row = static_cast<int>(tile.row_begin), expert = static_cast<int>(tile.expert);
    const int first = static_cast<int>(tile.column_block) * kOutColumns<kSwiglu>;
    const int second = first + (kSwiglu ? static_cast<int>(gemm.b.columns / 2) : kGemmColumns / 2);
    const int steps = gemm_steps(gemm, tile);
    for (int step = 0; step < steps; ++step, ring.advance(kGemmStages)) {
      Barrier* full = &shared.full[ring.stage];
      wait(&shared.empty[ring.stage], ring.parity ^ 1);
      arrive_expect_bytes(full, sizeof(shared.a[0]) + sizeof(shared.b[0]));
      load_box(shared.a[ring.stage], &a, full, step * kGemmDepth, row);
      load_box(shared.b[ring.stage], &b, full, step * kGemmDepth, first, expert);
      load_box(shared.b[ring.stage] + sizeof(shared.b[0]) / 2, &b, full, step * kGemmDepth, second, expert);
    }
  }
}

// All lanes of this warp have finished reading the stage.
__device__ __forceinline__ void release_stage(GemmShared& shared, int stage) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) arrive(&shared.empty[stage]);
}

// Sums of a warpgroup's 64 rows; one step's products run while the next one's are issued.
__device__ __forceinline__ void multiply_tile(GemmShared& shared, RingPosition& ring, int warpgroup, int steps,
                                              float (&sums)[kGemmColumns / 2]) {
  for (int step = 0; step < steps; ++step) {
    wait(&shared.full[ring.stage], ring.parity);
    const uint64_t a = matrix_descriptor(shared_address(shared.a[ring.stage] + warpgroup * sizeof(shared.a[0]) / 2));
    const uint64_t b = matrix_descriptor(shared_address(shared.b[ring.stage]));
    fence_accumulators();
#pragma unroll
    for (int i = 0; i < kGemmDepth / 16; ++i)  // 16 depths are 32 bytes; addresses in descriptors count 16
      multiply_bf16<kGemmColumns>(sums, a + i * 2, b + i * 2, step + i > 0);
    commit_products();
    wait_products<1>();
    if (step > 0) release_stage(shared, (ring.stage + kGemmStages - 1) % kGemmStages);
    ring.advance(kGemmStages);
  }
  wait_products<0>(sums);
  if (steps > 0) release_stage(shared, (ring.stage + kGemmStages - 1) % kGemmStages);
}

// For a warpgroup that has no rows in the tile.
__device__ __forceinline__ void skip_tile(GemmShared& shared, RingPosition& ring, int steps) {
  for (int step = 0; step < steps; ++step, ring.advance(kGemmStages)) {
    wait(&shared.full[ring.stage], ring.parity);
    release_stage(shared, ring.stage);
  }
}

// Values 2 i and 2 i + 1 of this thread's row of out, rounded.
template <bool kSwiglu>
__device__ __forceinline__ uint32_t out_pair(const float (&sums)[kGemmColumns / 2], int i) {
  constexpr int kUp = kGemmColumns / 4;  // from a gate to its up
  if constexpr (kSwiglu) return swiglu_pair(sums[2 * i], sums[2 * i + 1], sums[2 * i + kUp], sums[2 * i + 1 + kUp]);
  return pack_bf16(sums[2 * i], sums[2 * i + 1]);
}

// Rows [row, row_end) and columns [column, columns) of out [M, columns], from this warp's 16 x 64 rounded values.
__device__ __forceinline__ void store_rows(const unsigned char* values, BFloat16* out, int64_t columns, int64_t row,
                                           int64_t row_end, int64_t column) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, chunk = lane % 8;
  if (column + chunk * 8 >= columns) return;
#pragma unroll
  for (int r = lane / 8; r < kStoreRows; r += 4) {
    if (row + r >= row_end) return;
    *reinterpret_cast<uint4*>(out + (row + r) * columns + column + chunk * 8) =
        *reinterpret_cast<const uint4*>(values + swizzle_128b(r * kSwizzleRowBytes + chunk * 16));
  }
}

// This warp's 16 rows of a tile.
template <bool kSwiglu>
__device__ __forceinline__ void store_tile(GemmShared& shared, const GroupedGemm<BFloat16>& gemm, const GemmTile& tile,
                                           int warp, const float (&sums)[kGemmColumns / 2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row = tile.row_begin + warp * kStoreRows, column = tile.column_block * kOutColumns<kSwiglu>;
  unsigned char* values = shared.out[warp];
#pragma unroll
  for (int part = 0; part < kOutColumns<kSwiglu> / kStoreColumns; ++part) {
#pragma unroll
    for (int j = 0; j < kStoreColumns / 16; ++j) {
      uint32_t words[4];  // rows 0 to 7 and 8 to 15 of columns 0 to 7, then of columns 8 to 15
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = out_pair<kSwiglu>(sums, part * kStoreColumns / 4 + j * 4 + i);
      store_matrices(values + swizzle_128b(lane % 16 * kSwizzleRowBytes + (j * 2 + lane / 16) * 16), words);
    }
    __syncwarp();
    store_rows(values, gemm.out, out_columns<kSwiglu>(gemm), row, tile.row_end, column + part * kStoreColumns);
    __syncwarp();  // all has been read: the memory is free for the next part or tile
  }
}

template <bool kSwiglu>
__global__ void __launch_bounds__(kGemmThreads, 1)
    grouped_gemm_tile_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                             const GroupedGemm<BFloat16> gemm) {
  GemmShared& shared = *reinterpret_cast<GemmShared*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kGemmStages; ++stage) {
      init_barrier(&shared.full[stage], 1);
      init_barrier(&shared.empty[stage], kGemmWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    decrease_registers<40>();
    if (threadIdx.x == 0) load_tiles<kSwiglu>(a, b, gemm, shared);
    return;
  }
  increase_registers<232>();
  // From lane 0: the compiler then knows that descriptors are the same in all lanes, and computes them once a warp.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpSize - 4, 0);
  RingPosition ring;
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    const GemmTile tile = gemm_tile<kSwiglu>(gemm, index);
    if (tile.expert < 0) return;
    const int steps = gemm_steps(gemm, tile);
    if (tile.row_begin + warp / 4 * kGemmRows / 2 >= tile.row_end) {
      skip_tile(shared, ring, steps);
      continue;
    }
    float sums[kGemmColumns / 2];
    if (steps == 0) {
#pragma unroll
      for (float& sum : sums) sum = 0.0f;
    }
    multiply_tile(shared, ring, warp / 4, steps, sums);
    store_tile<kSwiglu>(shared, gemm, tile, warp, sums);
  }
}

}  // namespace mixtral::cuda
