// The formats of weights in the grouped GEMM of few rows: how a tile of 64 rows is loaded into shared memory, and how a
// warpgroup multiplies it with the tokens there. Here are bf16 and fp8; grouped_gemm_stream_int4_hopper.cuh has int4.
//
//   kFormat, Source           the format, and the kernel's argument for the weights
//   kDepth, kTileBytes        depths of a stage, and bytes of a tile of 64 rows and so many depths
//   kTokenBytes               bytes of a value of a token: a stage holds 128 bytes of every token
//   prefetch                  one thread: the tensor map, if any
//   load                      one thread: the tiles of a unit for one step, kTileBytes apart, on their way to `full`,
//                             where it announces their bytes and those of the tokens
//   multiply_tile             a warpgroup: sums += tile * tokens, finished on return; it calls release() when tile and
//                             tokens have been read. int4 has unpack and start_products instead
//   finish                    a warpgroup: the last operations on the sums of tile number `tile` of the expert
#pragma once

#include <cstdint>

#include "../../cuda/hopper_layout.h"
#include "../../cuda/kernel_hopper.cuh"
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

  template <int N, typename Release>
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

  template <int N, typename Release>
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
