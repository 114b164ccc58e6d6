// moe_permute in one kernel, without a host synchronisation: each block sorts a chunk of the copies and moves its rows.
//
// The place of a copy in the stable order is: all copies of smaller experts, then the earlier copies of its own expert.
// Every block counts both for itself over all M ids: 4 M bytes from L2 a block, a few microseconds at M = 32k beside
// the rows themselves (T H read, M H written, from and to HBM), and no second kernel that waits for a first one. Counts
// are integers: the order in which they are added does not matter.
#pragma once

#include <cstdint>

#include "../cuda/kernel.cuh"  // Vector, kWarpSize, dynamic_shared_memory, block_sum
#include "../host_device.h"
#include "../index_array.h"
#include "moe_permute.h"

namespace mixtral::cuda {

inline constexpr int kPermuteThreads = 256, kMaxChunk = 32;

// Copies per block: so few that a small batch spreads over a whole GPU, and never more than one per lane.
MIXTRAL_HOST_DEVICE constexpr int64_t permute_chunk(int64_t copies) {
  constexpr int64_t kBlocks = 264;
  const int64_t chunk = ceil_div(copies, kBlocks);
  return chunk < 1 ? 1 : chunk < kMaxChunk ? chunk : kMaxChunk;
}

// Shared memory of a block: total [E], before [E] and the row of each copy of the chunk.
MIXTRAL_HOST_DEVICE constexpr int64_t permute_shared_bytes(int64_t experts) {
  return (2 * experts + kMaxChunk) * static_cast<int64_t>(sizeof(int32_t));
}

MIXTRAL_HOST_DEVICE inline int valid_expert(IndexArray ids, int64_t i, int64_t copies, int64_t experts) {
  const int64_t id = i < copies ? ids[i] : -1;
  return id >= 0 && id < experts ? static_cast<int>(id) : -1;
}

// Counts the copies of every expert in total [E], those in front of `begin` in before [E].
__device__ inline void count_experts(IndexArray ids, int64_t copies, int64_t begin, int64_t experts, int32_t* total,
                                     int32_t* before) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  for (int64_t e = thread; e < 2 * experts; e += kPermuteThreads) total[e] = 0;  // before [E] is behind it
  __syncthreads();
  for (int64_t first = thread - lane; first < copies; first += kPermuteThreads) {
    const int id = valid_expert(ids, first + lane, copies, experts);
    const bool early = first + lane < begin;
    // One addition for all lanes of a kind.
    const unsigned peers = __match_any_sync(0xffffffffu, id * 2 + (early ? 1 : 0));
    if (id >= 0 && (peers & ((1u << lane) - 1)) == 0) {
      atomicAdd(&total[id], __popc(peers));
      if (early) atomicAdd(&before[id], __popc(peers));
    }
  }
  __syncthreads();
}

// total [E] -> the first row of every expert, in place; returns the number of all rows. One warp. `offs`, if given,
// receives the end offsets.
__device__ inline int32_t scan_experts(int32_t* total, int64_t experts, int32_t* offs) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int32_t start = 0;
  for (int64_t first = 0; first < experts; first += kWarpSize) {
    const int64_t e = first + lane;
    const int32_t count = e < experts ? total[e] : 0;
    int32_t end = start + count;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int32_t below = __shfl_up_sync(0xffffffffu, end - start, distance);
      if (lane >= distance) end += below;
    }
    if (e < experts) {
      total[e] = end - count;
      if (offs) offs[e] = end;
    }
    start = __shfl_sync(0xffffffffu, end, kWarpSize - 1);
  }
  return start;
}

// Block c: copies [c chunk, (c + 1) chunk). Word is 16 bytes where rows allow it, else one byte; row_words counts
// words.
template <typename Word>
__global__ void __launch_bounds__(kPermuteThreads)
    moe_permute_chunk_kernel(const Word* x, IndexArray ids, Word* __restrict__ permuted, int32_t* __restrict__ offs,
                             int32_t* __restrict__ row_map, int64_t copies, int64_t top_k, int64_t experts,
                             int64_t chunk, int64_t row_words) {
  start_behind_previous_kernel();
  auto* total = reinterpret_cast<int32_t*>(dynamic_shared_memory());
  int32_t *before = total + experts, *rows = before + experts;
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < copies ? begin + chunk : copies;
  count_experts(ids, copies, begin, experts, total, before);
  if (threadIdx.x < kWarpSize) {
    const int lane = static_cast<int>(threadIdx.x);
    const int32_t all = scan_experts(total, experts, blockIdx.x == 0 ? offs : nullptr);
    __syncwarp();
    const int64_t i = begin + lane;
    const int id = valid_expert(ids, i, end, experts);
    const unsigned peers = __match_any_sync(0xffffffffu, id);
    const int32_t row = id < 0 ? -1 : total[id] + before[id] + __popc(peers & ((1u << lane) - 1));
    if (i < end) row_map[i] = row;
    rows[lane] = row;
    __syncwarp();
    if (lane == 0) total[0] = all;
  }
  __syncthreads();
  const int32_t all = total[0];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = rows[i - begin];
    const Word* source = x + i / top_k * row_words;
    for (int64_t w = threadIdx.x; w < row_words; w += kPermuteThreads) {
      if (row >= 0) permuted[row * row_words + w] = source[w];
      if (i >= all) permuted[i * row_words + w] = Word{};  // dropped copies leave rows at the end unused
    }
  }
}

// A block per token; every thread sums its columns over k in order, kValues of them at a time. No weights: all 1.
template <typename T, int kValues>
__global__ void __launch_bounds__(kPermuteThreads)
    moe_unpermute_token_kernel(const T* y, const float* weights, CopyRows rows, T* __restrict__ out, int64_t top_k,
                               int64_t hidden) {
  start_behind_previous_kernel();
  using Values = Vector<T, kValues>;
  const int64_t t = blockIdx.x;
  for (int64_t h = threadIdx.x * kValues; h < hidden; h += kPermuteThreads * kValues) {
    float sums[kValues] = {};
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t row = rows[t * top_k + k];
      if (row < 0) continue;
      const float weight = weights ? weights[t * top_k + k] : 1.0f;
      const Values values = *reinterpret_cast<const Values*>(y + row * hidden + h);
#pragma unroll
      for (int i = 0; i < kValues; ++i) sums[i] = fmaf(weight, to_float(values.values[i]), sums[i]);
    }
    Values result;
#pragma unroll
    for (int i = 0; i < kValues; ++i) result.values[i] = from_float<T>(sums[i]);
    *reinterpret_cast<Values*>(out + t * hidden + h) = result;
  }
}

// A block per token: rows of grad_y [M, H], and grad_weights [T, K] by sums over its threads, each unless null.
template <typename T>
__global__ void __launch_bounds__(kPermuteThreads)
    moe_unpermute_backward_token_kernel(const T* __restrict__ grad, const T* __restrict__ y,
                                        const float* __restrict__ weights, CopyRows rows, T* __restrict__ grad_y,
                                        float* __restrict__ grad_weights, int64_t top_k, int64_t hidden) {
  const int64_t t = blockIdx.x;
  for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
    const int64_t row = rows[i];
    float dot = 0.0f;
    for (int64_t h = threadIdx.x; row >= 0 && h < hidden; h += kPermuteThreads) {
      const float g = to_float(grad[t * hidden + h]);
      if (grad_weights) dot = fmaf(g, to_float(y[row * hidden + h]), dot);
      if (grad_y) grad_y[row * hidden + h] = from_float<T>(weights[i] * g);
    }
    dot = block_sum(dot);
    if (grad_weights && threadIdx.x == 0) grad_weights[i] = dot;
  }
}

}  // namespace mixtral::cuda
