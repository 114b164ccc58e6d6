// The formats of weights in the grouped GEMM of few rows: how a tile of 64 rows is loaded into shared memory, and how a
// warpgroup multiplies it with the tokens there.
//
//   kFormat, Source           the format, and the kernel's argument for the weights
//   kDepth, kTileBytes        depths of a stage, and bytes of a tile of 64 rows and so many depths
//   kTokenBytes               bytes of a value of a token: a stage holds 128 bytes of every token
//   prefetch                  one thread: the tensor map, if any
//   load                      one thread: the tiles of a unit for one step, kTileBytes apart, on their way to `full`,
//                             where it announces their bytes and those of the tokens
//   multiply_tile             a warpgroup: sums += tile * tokens, finished on return; it calls release() when tile and
//                             tokens have been read
//   finish                    a warpgroup: the last operations on the sums of tile number `tile` of the expert
#pragma once

#include <cstdint>

#include "../../cuda/hopper_layout.h"
#include "../../cuda/kernel_hopper.cuh"
#include "../../pack_weight/packed_value.h"
#include "grouped_gemm_stream_hopper.h"

namespace mixtral::cuda {

inline constexpr int kStreamTileRows = 64;
inline constexpr uint64_t kDescriptorStep = 32 >> 4;  // from the depths of one product to the next: 32 bytes of a row

// Boxes of a tensor map (stream_weight_boxes): tiles of swizzled rows of 128 bytes. kRowsOfBlock: the map's.
template <bool kSwiglu, int kGroups, int kRowsOfBlock>
__device__ __forceinline__ void load_weight_boxes(unsigned char* shared, Barrier* full, const TensorMap& map,
                                                  const GemmTile& unit, int depth, int token_bytes) {
  constexpr int kRows = kGroups * kStreamTileRows, kBoxes = kSwiglu ? kRows / 16 : 1, kHalves = kSwiglu ? 2 : 1;
  constexpr int kBoxesOfBlock = kRowsOfBlock / 8;  // with SwiGLU
  const int block = static_cast<int>(unit.column_block * (kRows / kHalves / kRowsOfBlock));
  arrive_expect_bytes(full, kRows * kSwizzleRowBytes + token_bytes);
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    load_box(shared + box * (kRows / kBoxes * kSwizzleRowBytes), &map, full, depth, box % kBoxesOfBlock * 8,
             block + box / kBoxesOfBlock, static_cast<int>(unit.expert) * kHalves, L2Policy::kEvictFirst);
  }
}

struct BFloat16Weights {
  static constexpr WeightFormat kFormat = WeightFormat::kPlain;
  using Source = TensorMap;
  static constexpr int kDepth = 64, kTileBytes = kStreamTileRows * kSwizzleRowBytes, kTokenBytes = 2;

  static __device__ __forceinline__ void prefetch(const Source& source) { prefetch_tensor_map(&source); }

  template <bool kSwiglu, int kGroups>
  static __device__ __forceinline__ void load(unsigned char* shared, Barrier* full, const Source& source,
                                              const StreamGemm&, const GemmTile& unit, int step, int token_bytes) {
    load_weight_boxes<kSwiglu, kGroups, 8>(shared, full, source, unit, step * kDepth, token_bytes);
  }

  template <bool kSwiglu, int N, typename Release>
  static __device__ __forceinline__ void multiply_tile(float (&sums)[N / 2], const unsigned char* tile,
                                                       const unsigned char* tokens, const Release& release) {
    const uint64_t a = matrix_descriptor(shared_address(tile)), b = matrix_descriptor(shared_address(tokens));
    fence_accumulators();
#pragma unroll
    for (int k = 0; k < 4; ++k)  // 16 depths each
      multiply_bf16<N>(sums, a + k * kDescriptorStep, b + k * kDescriptorStep, true);
    commit_products();
    wait_products<0>();
    release();
  }

  template <bool kSwiglu, int N>
  static __device__ __forceinline__ void finish(float (&)[N / 2], const Source&, const StreamGemm&, const GemmTile&,
                                                int64_t) {}
};

// int4, packed as for the CPU (pack_weight.h): a tile is two steps of two blocks of 32 rows, which are two contiguous
// copies. With SwiGLU one block is of gate rows and one of the up rows of the same features. A thread reads the words
// that hold its operands, makes bf16 of them in registers and multiplies from there: nothing goes back to shared
// memory. The other blocks of the SM multiply meanwhile.
//
// If the rows or the depth end within a tile, the rest of it keeps the old contents of shared memory. That is harmless:
// any byte is a finite weight, and its products are in columns that are not stored, or with tokens that are zero.
//
// Instructions are the bottleneck: about 155 a warp and tile, of which 20 load and 64 convert. As many cycles of an SM
// for 2176 bytes are 3.3 TB/s at 1.75 GHz on 132 SMs: the bandwidth of HBM3, and less than that of HBM3e.
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
    static_assert(kGroups == 1, "a second tile may lie behind the weights");
    const int64_t blocks = gemm.columns / kBlockRows * (kSwiglu ? 2 : 1), steps = gemm.depth / 32;  // of an expert
    const int64_t first = unit.column_block * (kSwiglu ? 1 : 2), second = first + (kSwiglu ? blocks / 2 : 1);
    const int count = second < blocks ? 2 : 1;
    const int bytes = 2 * step + 1 < steps ? kBlockBytes : kInt4StepBytes;
    arrive_expect_bytes(full, count * bytes + token_bytes);
    for (int i = 0; i < count; ++i) {
      const int64_t block = unit.expert * blocks + (i == 0 ? first : second);
      load_bytes(shared + i * kBlockBytes, source.packed + (block * steps + 2 * step) * kInt4StepBytes, bytes, full,
                 L2Policy::kEvictFirst);
    }
  }

  // Two neighbouring depths as bf16: the nibbles at bits 1 and 17 of `word`; `scale` is that of the row, twice.
  static __device__ __forceinline__ uint32_t make_pair(uint32_t word, uint32_t scale) {
    constexpr uint32_t k64 = 0x42804280, k71Half = 0x428F428F;  // pairs of bf16; in 64 + n, n starts at bit 1
    return multiply_bf16_pair(subtract_bf16_pair(and_or(word, 0x001E001E, k64), k71Half), scale);
  }

  template <bool kSwiglu, int N, typename Release>
  static __device__ __forceinline__ void multiply_tile(float (&sums)[N / 2], const unsigned char* tile,
                                                       const unsigned char* tokens, const Release& release) {
    const int thread = threadIdx.x % 128, lane = thread % kWarpSize;
    const int turn = (lane % 4 * 4 + 31) % 32;  // to the right: nibble lane % 4 comes to bits 1 and 17
    uint32_t a[4][4];                           // for 16 depths each
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
          a[step * 2 + group / 2][group % 2 * 2 + half] = make_pair(__funnelshift_r(word, word, turn), scale);
        }
      }
    }
    const uint64_t b = matrix_descriptor(shared_address(tokens));
    fence_accumulators();
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_bf16<N, false>(sums, a[k], b + k * kDescriptorStep, true);
    commit_products();
    wait_products<0>();
    release();
  }

  template <bool kSwiglu, int N>
  static __device__ __forceinline__ void finish(float (&)[N / 2], const Source&, const StreamGemm&, const GemmTile&,
                                                int64_t) {}
};

// fp8, packed as for the CPU: blocks of 32 rows of e4m3 numbers, and behind them a scale for each row. The tokens are
// e4m3 with a scale each. The tensor cores keep fewer bits than f32 of a running sum of e4m3 products: every 128 depths
// it is added to one in f32 by other units.
struct E4m3Weights {
  static constexpr WeightFormat kFormat = WeightFormat::kFp8;
  struct Source {
    TensorMap map;
    const char* packed;         // [experts, blocks, 32 * Kdim + 128], the memory of `map`
    const float* token_scales;  // [rows]
  };
  static constexpr int kDepth = 128, kTileBytes = kStreamTileRows * kSwizzleRowBytes, kTokenBytes = 1;

  static __device__ __forceinline__ void prefetch(const Source& source) { prefetch_tensor_map(&source.map); }

  template <bool kSwiglu, int kGroups>
  static __device__ __forceinline__ void load(unsigned char* shared, Barrier* full, const Source& source,
                                              const StreamGemm&, const GemmTile& unit, int step, int token_bytes) {
    load_weight_boxes<kSwiglu, kGroups, kBlockRows>(shared, full, source.map, unit, step * kDepth, token_bytes);
  }

  template <bool kSwiglu, int N, typename Release>
  static __device__ __forceinline__ void multiply_tile(float (&sums)[N / 2], const unsigned char* tile,
                                                       const unsigned char* tokens, const Release& release) {
    const uint64_t a = matrix_descriptor(shared_address(tile)), b = matrix_descriptor(shared_address(tokens));
    float part[N / 2];
    fence_accumulators();
#pragma unroll
    for (int k = 0; k < 4; ++k)  // 32 depths each; the first product sets `part`
      multiply_e4m3<N>(part, a + k * kDescriptorStep, b + k * kDescriptorStep, k > 0);
    commit_products();
    wait_products<0>(part);
    release();
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] += part[i];
  }

  template <bool kSwiglu, int N>
  static __device__ __forceinline__ void finish(float (&sums)[N / 2], const Source& source, const StreamGemm& gemm,
                                                const GemmTile& unit, int64_t tile) {
    const int thread = threadIdx.x % 128;
    const int64_t weight_rows = gemm.columns * (kSwiglu ? 2 : 1);
    const int64_t block_bytes = packed_block_bytes(kFormat, gemm.depth, 1);
    float weight_scales[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = stream_weight_row(gemm.columns, kSwiglu, tile, accumulator_row(thread, half * 2));
      if (row >= weight_rows) continue;  // after the last column
      const char* block = source.packed + (unit.expert * weight_rows + row) / kBlockRows * block_bytes;
      weight_scales[half] = reinterpret_cast<const float*>(block + kBlockRows * gemm.depth)[row % kBlockRows];
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int64_t token = unit.row_begin + accumulator_column(thread, i);
      const float token_scale = token < unit.row_end ? source.token_scales[token] : 0.0f;
      sums[i] = sums[i] * weight_scales[i / 2 % 2] * token_scale;  // the product of the scales alone could overflow
    }
  }
};

}  // namespace mixtral::cuda
