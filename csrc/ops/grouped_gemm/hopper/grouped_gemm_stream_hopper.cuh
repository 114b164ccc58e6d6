// The grouped GEMM of few rows on Hopper, bound by reading the weights once; and of many rows with packed weights.
//
// The operands are swapped: 64 rows of weights are the M operand of wgmma, the rows of a ("tokens") its N operand,
// which may be as small as 8. So a group is padded to 8, 16, 32, ... tokens, not to 64 or 128.
//
// Who computes what. A unit of work is 64 rows of weights per consumer warpgroup times the whole depth, against up to
// Shape::kRows tokens of one expert; blocks walk units blockIdx.x, + gridDim.x, ... (find_stream_unit: experts without
// tokens have none). One thread of a producer warp fills a ring, a stage being the weights and the tokens of 64 or 128
// depths; the consumers multiply, turn their sums around in shared memory, and store rows of out in pieces of 16 bytes.
// The ring runs on from unit to unit, so memory stays busy during the stores. Unsorted rows with expert ids are
// in no groups, but in every unit (grouped_gemm_stream_routing_hopper.cuh).
//
// SwiGLU. A tile of weights is 8 gate rows, the 8 up rows of the same features, the next 8 gate rows and so on. The
// accumulator then has the gate of a feature in values 4 j, 4 j + 1 and its up in values 4 j + 2, 4 j + 3 of one
// thread. Both are rounded to bf16 first: the bits are those of the plain product followed by the op swiglu.
//
// Shapes:
//   bf16, up to 16 rows: 1 warpgroup, 16 tokens, 10 stages of 8 + 2 KiB, 103 KiB of shared memory, 2 blocks on each SM
//   bf16, up to 64 rows: 1 warpgroup, 64 tokens, 6 stages of 8 + 8 KiB, 106 KiB, 2 blocks on each SM
//   bf16, more:          2 warpgroups share 256 tokens, 4 stages of 16 + 32 KiB, 211 KiB, 1 block on each SM
//   int4, few rows:      1 warpgroup, 32 tokens, 8 stages of 2.1 + 4 KiB, 54 KiB, 4 blocks on each SM: where one waits
//                        for its products or its tile, others fill the gap
//   int4, more:          2 warpgroups share 256 tokens, 5 stages of 4.3 + 32 KiB, 200 KiB, 1 block on each SM
//   fp8, up to 64 rows:  as bf16
//   fp8, more:           2 warpgroups share 128 tokens, 6 stages of 16 + 16 KiB, 211 KiB, 1 block on each SM; a sum
//                        takes two registers
// Registers: N / 2 sums a thread and few others, with int4 the 32 of two tiles; 128 sums have 232 registers.
//
// Roofline: 2 bytes of bf16 weights make 2 N operations, so the bound is memory up to 200 (H200) to 300 (H100) tokens
// an expert: bytes = active experts * rows of weights * Kdim * 2, once (1 for e4m3, 0.53 for int4), plus tokens from
// L2. To keep HBM busy an SM must have 20 to 30 KB in flight (3.35 to 4.8 TB/s at about 1 us, over 132 SMs); the shapes
// have 160, 96, 64, 68, 21, 96 and 96 KiB of weights. That is why nothing splits the depth to even out the last units,
// or to have more of them (a dense layer of 4096 columns has 64 units, with 5 MiB in flight): the blocks that are left
// share the bandwidth, and half of the SMs can still draw all of it. So the depth is summed in one order for every row.
// With fp8 and int4, prefill runs here too. A step of 4.2 MFLOP takes 32 KiB from L2 with fp8, for 512 cycles of
// products: 64 bytes a cycle, where L2 gives some 46. With int4 it takes 36 KiB for 1024 cycles: 36 bytes a cycle, less
// than the tile kernel's 48, while 3 of 10 instructions that an SM can issue make bf16 of the weights.
#pragma once

#include <cstdint>

#include "../../cuda/hopper_layout.h"
#include "../../cuda/kernel_hopper.cuh"
#include "grouped_gemm_stream_hopper.h"
#include "grouped_gemm_stream_int4_hopper.cuh"
#include "grouped_gemm_stream_output_hopper.cuh"
#include "grouped_gemm_stream_routing_hopper.cuh"
#include "grouped_gemm_stream_weights_hopper.cuh"

namespace mixtral::cuda {

template <int kGroups_, int kRows_, int kStages_, int kBlocksPerSm_>
struct StreamShape {
  static constexpr int kGroups = kGroups_;                 // consumer warpgroups
  static constexpr int kRows = kRows_;                     // most tokens of a unit
  static constexpr int kStaged = kRows < 64 ? kRows : 64;  // tokens that go through shared memory to out at a time
  static constexpr int kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
  // Sums of 256 tokens need the registers of a producer warpgroup; else a producer warp does.
  static constexpr bool kMovesRegisters = kRows > 128;
  static constexpr int kConsumers = kGroups * 128, kThreads = kConsumers + (kMovesRegisters ? 128 : kWarpSize);
  static constexpr int columns(bool swiglu) { return kGroups * kStreamTileRows / (swiglu ? 2 : 1); }  // of a unit
};
using FewestRows = StreamShape<1, 16, 10, 2>;
using FewRows = StreamShape<1, 64, 6, 2>;
using MoreRows = StreamShape<2, 256, 4, 1>;
using Int4Rows = StreamShape<1, 32, 8, 4>;
using MoreInt4Rows = StreamShape<2, 256, 5, 1>;
using MoreE4m3Rows = StreamShape<2, 128, 6, 1>;

template <typename Weights, typename Shape>
struct StreamShared {
  unsigned char tokens[Shape::kStages][Shape::kRows * kSwizzleRowBytes];  // first, and the weights: multiples of 1024
  unsigned char weights[Shape::kStages][Shape::kGroups * Weights::kTileBytes];
  unsigned char staged[Shape::kGroups][Shape::kStaged * StreamOutput<false>::kPitch];
  Barrier full[Shape::kStages], empty[Shape::kStages];
  StreamRouting routing;  // of routed rows
};
template <typename Weights, typename Shape>
inline constexpr bool kFits = Shape::kBlocksPerSm*(sizeof(StreamShared<Weights, Shape>) + 1024) <= 228 << 10;
static_assert(kFits<BFloat16Weights, FewestRows> && kFits<BFloat16Weights, FewRows> &&
              kFits<BFloat16Weights, MoreRows> && kFits<Int4Weights, Int4Rows> && kFits<Int4Weights, MoreInt4Rows> &&
              kFits<E4m3Weights, FewRows> && kFits<E4m3Weights, MoreE4m3Rows>);

// The rows of a, in boxes of several sizes.
struct TokenMaps {
  TensorMap boxes[kTokenBoxes];
};

template <typename Shape, bool kSwiglu>
__device__ __forceinline__ GemmTile stream_unit(const StreamGemm& gemm, const StreamRouting& routing, uint32_t index) {
  return gemm.routed.ids.data ? find_routed_unit(gemm, routing, Shape::columns(kSwiglu), index)
                              : find_stream_unit(gemm, Shape::kRows, Shape::columns(kSwiglu), index);
}

template <typename Weights>
__device__ __forceinline__ int stream_steps(const StreamGemm& gemm) {
  return static_cast<int>(stream_blocks(gemm.depth, Weights::kDepth));
}

// ---- producer: one thread

// Tensor maps lie in constant memory: without this the first box waits for its map to come from there.
template <typename Weights, typename Shape>
__device__ __forceinline__ void prefetch_maps(const typename Weights::Source& weights, const TokenMaps& tokens,
                                              const StreamGemm& gemm) {
  Weights::prefetch(weights);
  prefetch_tensor_map(&tokens.boxes[token_box(gemm.rows < Shape::kRows ? gemm.rows : Shape::kRows)]);
}

template <typename Weights, typename Shape, bool kSwiglu>
__device__ __forceinline__ void load_weights(StreamShared<Weights, Shape>& shared,
                                             const typename Weights::Source& weights, const StreamGemm& gemm,
                                             const GemmTile& unit, int step, int stage) {
  const int tokens = 8 << token_box(unit.row_end - unit.row_begin);
  Weights::template load<kSwiglu, Shape::kGroups>(shared.weights[stage], &shared.full[stage], weights, gemm, unit, step,
                                                  tokens * kSwizzleRowBytes);
}

template <typename Weights, typename Shape>
__device__ __forceinline__ void load_tokens(StreamShared<Weights, Shape>& shared, const TokenMaps& tokens,
                                            const GemmTile& unit, int step, int stage) {
  const TensorMap& map = tokens.boxes[token_box(unit.row_end - unit.row_begin)];
  load_box(shared.tokens[stage], &map, &shared.full[stage], step * (kSwizzleRowBytes / Weights::kTokenBytes),
           static_cast<int>(unit.row_begin), L2Policy::kEvictLast);
}

template <typename Weights, typename Shape, bool kSwiglu>
__device__ void stream_operands(StreamShared<Weights, Shape>& shared, const typename Weights::Source& weights,
                                const TokenMaps& tokens, const StreamGemm& gemm) {
  const int steps = stream_steps<Weights>(gemm);
  // Load weights while the previous kernel still runs, unless that kernel computes which experts have work.
  int ready = 0;
  if (units_need_no_offs(gemm)) {
    const GemmTile unit = stream_unit<Shape, kSwiglu>(gemm, shared.routing, blockIdx.x);
#pragma unroll 1
    for (; ready < Shape::kStages && ready < steps && unit.expert >= 0; ++ready)
      load_weights<Weights, Shape, kSwiglu>(shared, weights, gemm, unit, ready, ready);
  }
  wait_for_previous_kernel();
  RingPosition ring;
  for (uint32_t index = blockIdx.x;; index += gridDim.x) {
    const GemmTile unit = stream_unit<Shape, kSwiglu>(gemm, shared.routing, index);
    if (unit.expert < 0) return;
    if (unit.expert == gemm.experts) continue;  // rows after the last group: no product
    for (int step = 0; step < steps; ++step, ring.advance(Shape::kStages)) {
      wait(&shared.empty[ring.stage], ring.parity ^ 1);
      if (ready > 0)
        --ready;
      else
        load_weights<Weights, Shape, kSwiglu>(shared, weights, gemm, unit, step, ring.stage);
      load_tokens(shared, tokens, unit, step, ring.stage);
    }
  }
}

// ---- consumers: warpgroup `group`, its threads 0 to 127

// All lanes of this warp have finished reading the stage.
template <typename Weights, typename Shape>
__device__ __forceinline__ void release_stage(StreamShared<Weights, Shape>& shared, int stage) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) arrive(&shared.empty[stage]);
}

template <int N, typename Weights, typename Shape>
__device__ __forceinline__ void multiply_unit(StreamShared<Weights, Shape>& shared, RingPosition& ring, int steps,
                                              int group, float (&sums)[N / 2]) {
  for (int step = 0; step < steps; ++step, ring.advance(Shape::kStages)) {
    wait(&shared.full[ring.stage], ring.parity);
    Weights::template multiply_tile<N>(sums, shared.weights[ring.stage] + group * Weights::kTileBytes,
                                       shared.tokens[ring.stage], [&] { release_stage(shared, ring.stage); });
  }
}

// int4: while the products of a step run, the tile of the next step is unpacked into other registers.
template <int N, bool kSwiglu, typename Shape>
__device__ __forceinline__ void multiply_int4_unit(StreamShared<Int4Weights, Shape>& shared, RingPosition& ring,
                                                   int steps, int group, float (&sums)[N / 2]) {
  Int4Weights::Operands tiles[2];
  const auto unpack = [&](const RingPosition& at, Int4Weights::Operands& tile) {
    wait(&shared.full[at.stage], at.parity);
    Int4Weights::unpack<kSwiglu>(tile, shared.weights[at.stage] + group * Int4Weights::kTileBytes);
  };
  unpack(ring, tiles[0]);
  for (int step = 0; step < steps; step += 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (step + i == steps) break;
      Int4Weights::start_products<N>(sums, tiles[i], shared.tokens[ring.stage]);
      RingPosition next = ring;
      next.advance(Shape::kStages);
      if (step + i + 1 < steps) unpack(next, tiles[1 - i]);
      wait_products<0>(sums);
      release_stage(shared, ring.stage);
      ring = next;
    }
  }
}

// A unit of up to N tokens; of more, one of twice as many.
template <typename Weights, typename Shape, bool kSwiglu, int N = 8>
__device__ __forceinline__ void compute_unit(StreamShared<Weights, Shape>& shared,
                                             const typename Weights::Source& weights, const StreamGemm& gemm,
                                             const GemmTile& unit, int64_t zeros, RingPosition& ring) {
  if constexpr (N < Shape::kRows) {
    if (unit.row_end - unit.row_begin > N)
      return compute_unit<Weights, Shape, kSwiglu, 2 * N>(shared, weights, gemm, unit, zeros, ring);
  }
  constexpr int kStaged = Shape::kStaged;
  const int group = threadIdx.x / 128;
  const int64_t tile = unit.column_block * Shape::kGroups + group;
  float sums[N / 2] =
      {};  // set here, not by the first product: else the sums of every N would stay alive from unit to unit
  if constexpr (Weights::kFormat == WeightFormat::kInt4)
    multiply_int4_unit<N, kSwiglu>(shared, ring, stream_steps<Weights>(gemm), group, sums);
  else
    multiply_unit<N>(shared, ring, stream_steps<Weights>(gemm), group, sums);
  Weights::template finish<kSwiglu, N>(sums, weights, gemm, unit, tile);
#pragma unroll
  for (int first = 0; first < N; first += kStaged) {
    stage_sums<N, kStaged, kSwiglu>(shared.staged[group], sums, first);
    named_barrier_sync(1 + group, 128);
    store_staged<kStaged, kSwiglu>(shared.staged[group], gemm, shared.routing, unit, zeros, unit.row_begin + first,
                                   tile * StreamOutput<kSwiglu>::kColumns);
    named_barrier_sync(1 + group, 128);  // read before the next tokens are staged
  }
}

template <typename Shape, bool kSwiglu>
__device__ void clear_unit(const StreamGemm& gemm, const GemmTile& unit) {
  constexpr int kPieces = Shape::columns(kSwiglu) / 8;
  const int thread = threadIdx.x;
  const int64_t column = (unit.column_block * kPieces + thread % kPieces) * 8;
  if (column >= gemm.columns) return;
  for (int64_t row = unit.row_begin + thread / kPieces; row < unit.row_end; row += Shape::kConsumers / kPieces)
    *reinterpret_cast<uint4*>(gemm.out + row * gemm.columns + column) = uint4{0, 0, 0, 0};
}

template <typename Weights, typename Shape, bool kSwiglu>
__device__ void compute_units(StreamShared<Weights, Shape>& shared, const typename Weights::Source& weights,
                              const StreamGemm& gemm) {
  wait_for_previous_kernel();  // it writes offs, and may still read the memory of out
  const bool one_group = gemm.offs.data && gemm.experts == 1;
  const int64_t zeros = one_group ? group_end(gemm.offs, 0, 0, gemm.rows) : gemm.rows;  // from this row on
  RingPosition ring;
  for (uint32_t index = blockIdx.x;; index += gridDim.x) {
    const GemmTile unit = stream_unit<Shape, kSwiglu>(gemm, shared.routing, index);
    if (unit.expert < 0) return;
    if (unit.expert == gemm.experts)
      clear_unit<Shape, kSwiglu>(gemm, unit);
    else
      compute_unit<Weights, Shape, kSwiglu>(shared, weights, gemm, unit, zeros, ring);
  }
}

// tokens: a [M, Kdim], boxes of 128 bytes of 8, 16, ... rows.
template <typename Weights, typename Shape, bool kSwiglu>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm)
    grouped_gemm_stream_kernel(const __grid_constant__ typename Weights::Source weights,
                               const __grid_constant__ TokenMaps tokens, const __grid_constant__ StreamGemm gemm) {
  auto& shared = *reinterpret_cast<StreamShared<Weights, Shape>*>(dynamic_shared_memory());
  if (threadIdx.x == Shape::kConsumers) {  // the producer, while the first warp reads ids
    prefetch_maps<Weights, Shape>(weights, tokens, gemm);
    for (int s = 0; s < Shape::kStages; ++s) {
      init_barrier(&shared.full[s], 1);
      init_barrier(&shared.empty[s], Shape::kConsumers / kWarpSize);
    }
    fence_barrier_init();
  }
  if (gemm.routed.ids.data && threadIdx.x < kWarpSize) {
    if (!gemm.routed.ids_ready) wait_for_previous_kernel();
    read_routing(shared.routing, gemm);
  }
  __syncthreads();
  let_next_kernel_start();  // not before the wait for ids: the second product of a layer relies on it
  if (threadIdx.x < Shape::kConsumers) {
    if constexpr (Shape::kMovesRegisters) increase_registers<232>();
    compute_units<Weights, Shape, kSwiglu>(shared, weights, gemm);
  } else {
    if constexpr (Shape::kMovesRegisters) decrease_registers<40>();
    if (threadIdx.x == Shape::kConsumers) stream_operands<Weights, Shape, kSwiglu>(shared, weights, tokens, gemm);
  }
}

}  // namespace mixtral::cuda
