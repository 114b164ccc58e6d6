// int4 weights in the grouped GEMM of few rows (grouped_gemm_stream_weights_hopper.cuh), and of many.
//
// Packed as for the CPU (pack_weight.h): a tile is two steps of two blocks of 32 rows, which are two contiguous copies.
// With SwiGLU one block is of gate rows and one of the up rows of the same features. A thread reads the words that hold
// its operands, makes bf16 of them in registers and multiplies from there: nothing goes back to shared memory. It makes
// those of the next step while the products of this one run.
//
// If the rows or the depth end within a tile, the rest of it keeps the old contents of shared memory. That is harmless:
// any byte is a finite weight, and its products are in columns that are not stored, or with tokens that are zero.
//
// Few tokens: instructions are the bottleneck, about 155 a warp and tile, of which 20 load and 64 convert. As many
// cycles of an SM for 2176 bytes are 3.3 TB/s at 1.75 GHz on 132 SMs: the bandwidth of HBM3, and less than that of
// HBM3e. Many tokens: two warpgroups issue 310 instructions a scheduler for the 1024 cycles that the products of their
// tiles take with 256 tokens. With the weights on the right of wgmma instead, as in the tile kernel, bf16 would have to
// go through shared memory, and twice as many weights would be unpacked for the same products.
#pragma once

#include <cstdint>

#include "../../cuda/hopper_layout.h"
#include "../../cuda/kernel_hopper.cuh"
#include "../../pack_weight/packed_value.h"
#include "grouped_gemm_stream_hopper.h"
#include "grouped_gemm_stream_weights_hopper.cuh"

namespace mixtral::cuda {

struct Int4Weights {
  static constexpr WeightFormat kFormat = WeightFormat::kInt4;
  struct Source {
    const char* packed;  // [experts, blocks of 32 rows, steps of 32 depths, kInt4StepBytes]
  };
  static constexpr int kDepth = 64, kBlockBytes = 2 * kInt4StepBytes, kTileBytes = 2 * kBlockBytes, kTokenBytes = 2;

  static __device__ __forceinline__ void prefetch(const Source&) {}

  template <bool kSwiglu, int kGroups>
  static __device__ __forceinline__ void load(unsigned char* shared, Barrier* full, const Source& source,
                                              const StreamGemm& gemm, const GemmTile& unit, int step, int token_bytes) {
    constexpr int kHalves = kSwiglu ? 2 : 1, kColumnBlocks = 2 * kGroups / kHalves;  // of a unit
    const int blocks = static_cast<int>(gemm.columns / kBlockRows), steps = static_cast<int>(gemm.depth / 32);
    const int first = static_cast<int>(unit.column_block) * kColumnBlocks;
    const int count = (blocks - first < kColumnBlocks ? blocks - first : kColumnBlocks) * kHalves;
    const int bytes = 2 * step + 1 < steps ? kBlockBytes : kInt4StepBytes;
    arrive_expect_bytes(full, count * bytes + token_bytes);
#pragma unroll 1  // the producer has few registers
    for (int i = 0; i < count; ++i) {
      const int64_t block = unit.expert * kHalves * blocks + first + (kSwiglu ? i / 2 + i % 2 * blocks : i);
      load_bytes(shared + i * kBlockBytes, source.packed + (block * steps + 2 * step) * kInt4StepBytes, bytes, full,
                 L2Policy::kEvictFirst);
    }
  }

  // Two neighbouring depths as bf16: the nibbles at bits 1 and 17 of `word`; `scale` is that of the row, twice.
  static __device__ __forceinline__ uint32_t make_pair(uint32_t word, uint32_t scale) {
    constexpr uint32_t k64 = 0x42804280, k71Half = 0x428F428F;  // pairs of bf16; in 64 + n, n starts at bit 1
    return multiply_bf16_pair(subtract_bf16_pair(and_or(word, 0x001E001E, k64), k71Half), scale);
  }

  // A thread's part of a tile as operands of wgmma, for 16 depths each.
  struct Operands {
    uint32_t words[4][4];
  };

  template <bool kSwiglu>
  static __device__ __forceinline__ void unpack(Operands& operands, const unsigned char* tile) {
    const int thread = threadIdx.x % 128, lane = thread % kWarpSize;
    const int turn = (lane % 4 * 4 + 31) % 32;  // to the right: nibble lane % 4 comes to bits 1 and 17
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = static_cast<int>(stream_weight_row(kBlockRows, kSwiglu, 0, accumulator_row(thread, half * 2)));
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const unsigned char* rows = tile + row / kBlockRows * kBlockBytes + step * kInt4StepBytes;
        const uint32_t scale = int4_scale_bits(rows[row % kBlockRows]) * 0x10001u;
#pragma unroll
        for (int group = 0; group < 4; ++group) {
          const uint32_t word = *reinterpret_cast<const uint32_t*>(rows + int4_word_offset(row % kBlockRows, group));
          operands.words[step * 2 + group / 2][group % 2 * 2 + half] =
              make_pair(__funnelshift_r(word, word, turn), scale);
        }
      }
    }
  }

  // sums += tile * tokens, of all rows of a unit's step, on their way.
  template <int N>
  static __device__ __forceinline__ void start_products(float (&sums)[N / 2], const Operands& operands,
                                                        const unsigned char* tokens) {
    const uint64_t b = matrix_descriptor(shared_address(tokens));
    fence_accumulators();
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_bf16<N, false>(sums, operands.words[k], b + k * kDescriptorStep, true);
    commit_products();
  }

  template <bool kSwiglu, int N>
  static __device__ __forceinline__ void finish(float (&)[N / 2], const Source&, const StreamGemm&, const GemmTile&,
                                                int64_t) {}
};

}  // namespace mixtral::cuda
