// Unsorted rows with expert ids, in the grouped GEMM of few rows: every block finds out for itself which experts have
// work, so that no kernel has to sort and move rows first.
//
// A unit multiplies all rows with the weights of one expert and stores those routed to it; the other columns of the
// accumulator, even NaN, do not touch them. That costs no time where memory is the bound: of 64 tokens, the tensor
// cores take 128 cycles for 8 KiB of bf16 weights, which HBM takes 410 to 590 cycles to bring. int4 weights come almost
// four times as fast, so their tokens are at most 32. A row has the bits that it has in a group: one order of sums.
//
// Two products follow each other in an expert layer. ids is written by a kernel before the first one. The second one
// reads ids at its start (RoutedRows::ids_ready) and fills its ring with weights while the first one still runs. It may
// do so because ids is complete before the kernel in front of it lets it start:
//
//   The first product waits for the kernels before it, and so for ids, and only then lets the next kernel start.
//   Every later kernel starts after that. So kernels between the products may let the next one start at any time, as
//   quantize_rows does with fp8. A kernel between the writer of ids and the first product must itself wait before it
//   ends, or the first product does not wait for ids.
//
// Who adds a kernel to a layer adds it to the test of this rule (GroupedGemmRouted.IdsAreCompleteWhen...).
#pragma once

#include <cstdint>

#include "../../cuda/kernel_hopper.cuh"
#include "grouped_gemm_stream_hopper.h"

namespace mixtral::cuda {

struct StreamRouting {
  int32_t experts[kMaxRoutedCopies];  // of every copy that there is; -1: none
  int32_t active[kMaxRoutedCopies];   // every expert with a copy, once, in the order of first copies
  int32_t active_count;
};

// From L2: before a wait for earlier kernels, L1 may hold stale values.
__device__ __forceinline__ int64_t load_id(IndexArray ids, int64_t i) {
  return ids.is_int64 ? __ldcg(static_cast<const int64_t*>(ids.data) + i)
                      : __ldcg(static_cast<const int32_t*>(ids.data) + i);
}

// One warp.
__device__ __forceinline__ void read_routing(StreamRouting& routing, const StreamGemm& gemm) {
  const int lane = threadIdx.x % kWarpSize;
  const int copies = static_cast<int>(gemm.rows * gemm.routed.copies);
  const unsigned lower_lanes = (1u << lane) - 1;
  int count = 0;
#pragma unroll 1
  for (int first = 0; first < copies; first += kWarpSize) {
    const int64_t id = first + lane < copies ? load_id(gemm.routed.ids, first + lane) : -1;
    const int expert = id >= 0 && id < gemm.experts ? static_cast<int>(id) : -1;
    bool is_new = (__match_any_sync(0xFFFFFFFFu, expert) & lower_lanes) == 0 && expert >= 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) is_new = is_new && routing.active[i] != expert;
    const unsigned all_new = __ballot_sync(0xFFFFFFFFu, is_new);
    if (is_new) routing.active[count + __popc(all_new & lower_lanes)] = expert;
    routing.experts[first + lane] = expert;
    count += __popc(all_new);
    __syncwarp();
  }
  if (lane == 0) routing.active_count = count;
}

// Unit `index` of the work: `unit_columns` columns of out for all rows and one of the active experts.
__device__ __forceinline__ GemmTile find_routed_unit(const StreamGemm& gemm, const StreamRouting& routing,
                                                     uint32_t unit_columns, uint32_t index) {
  const uint32_t blocks = stream_blocks(gemm.columns, unit_columns), active = index / blocks;
  if (active >= static_cast<uint32_t>(routing.active_count)) return {-1, 0, 0, 0};
  return {routing.active[active], 0, gemm.rows, index - active * blocks};
}

}  // namespace mixtral::cuda
