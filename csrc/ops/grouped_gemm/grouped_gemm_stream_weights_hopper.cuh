// What the formats of weights do differently in the grouped GEMM of few rows: how a tile of 64 rows comes into shared
// memory, and how a warpgroup multiplies it with the tokens there.
//
//   Source                    the weights, as the kernel takes them
//   kDepth, kTileBytes        depths of a stage, and bytes of a tile of 64 rows and so many depths
//   kTokenBytes               bytes of a value of a token: a stage holds 128 bytes of every token
//   load                      one thread: the tiles of a unit for one step, kTileBytes each, on their way to `full`
//   multiply_tile             a warpgroup: sums += tile * tokens, finished on return
//   finish                    a warpgroup: what is left to do with the sums of tile number `tile` of the expert
#pragma once

#include <cstdint>

#include "../cuda/hopper_layout.h"
#include "grouped_gemm_stream_hopper.h"
#include "int4_tile.h"

namespace mixtral::cuda {

inline constexpr int kStreamTileRows = 64;
inline constexpr uint64_t kDescriptorStep = 32 >> 4;  // from the depths of one product to the next: 32 bytes of a row

// Boxes of a tensor map (stream_weight_boxes): tiles of swizzled rows of 128 bytes.
template <bool kSwiglu, int kGroups>
__device__ __forceinline__ void load_weight_boxes(unsigned char* shared, Barrier* full, const TensorMap& map,
                                                  const GemmTile& unit, int depth) {
  constexpr int kRows = kGroups * kStreamTileRows, kBoxes = kSwiglu ? kRows / 16 : 1, kHalves = kSwiglu ? 2 : 1;
  const int group = static_cast<int>(unit.column_block * (kRows / 8 / kHalves));
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    load_box(shared + box * (kRows / kBoxes * kSwizzleRowBytes), &map, full, depth, 0, group + box,
             static_cast<int>(unit.expert) * kHalves, L2Policy::kEvictFirst);
  }
}

struct BFloat16Weights {
  using Source = TensorMap;
  static constexpr int kDepth = 64, kTileBytes = kStreamTileRows * kSwizzleRowBytes, kTokenBytes = 2;

  template <bool kSwiglu, int kGroups>
  static __device__ __forceinline__ void load(unsigned char* shared, Barrier* full, const Source& source,
                                              const StreamGemm&, const GemmTile& unit, int step) {
    load_weight_boxes<kSwiglu, kGroups>(shared, full, source, unit, step * kDepth);
  }

  template <int N>
  static __device__ __forceinline__ void multiply_tile(float (&sums)[N / 2], const unsigned char* tile,
                                                       const unsigned char* tokens) {
    const uint64_t a = matrix_descriptor(shared_address(tile)), b = matrix_descriptor(shared_address(tokens));
    fence_accumulators();
#pragma unroll
    for (int k = 0; k < 4; ++k)  // 16 depths each
      multiply_bf16<N>(sums, a + k * kDescriptorStep, b + k * kDescriptorStep, true);
    commit_products();
    wait_products<0>();
  }

  template <bool kSwiglu, int N>
  static __device__ __forceinline__ void finish(float (&)[N / 2], const Source&, const StreamGemm&, const GemmTile&,
                                                int64_t) {}
};

// int4 (int4_tile.h): a tile is one contiguous copy. A thread reads its operands of a tile, 32 nibbles, as 16 bytes,
// makes bf16 of them in registers and multiplies from there: nothing goes back to shared memory. The other blocks of
// the SM multiply meanwhile.
struct Int4Weights {
  struct Source {
    const uint8_t* tiles;  // [experts, tiles of 64 rows, tiles of 64 depths, kInt4TileBytes]
  };
  static constexpr int kDepth = kInt4TileDepth, kTileBytes = kInt4TileBytes, kTokenBytes = 2;

  template <bool kSwiglu, int kGroups>
  static __device__ __forceinline__ void load(unsigned char* shared, Barrier* full, const Source& source,
                                              const StreamGemm& gemm, const GemmTile& unit, int step) {
    static_assert(kGroups == 1, "a second tile may lie behind the weights");
    const int64_t tile = unit.expert * int4_row_tiles(gemm.columns, kSwiglu) + unit.column_block;
    load_bytes(shared, source.tiles + (tile * ceil_div(gemm.depth, kInt4TileDepth) + step) * kInt4TileBytes,
               kInt4TileBytes, full, L2Policy::kEvictFirst);
  }

  // The four registers of 16 depths from a word of eight nibbles and the scales of its two rows.
  static __device__ __forceinline__ void make_operand(uint32_t (&a)[4], uint32_t word, uint32_t scales) {
    constexpr uint32_t kNibbles = 0x001E001E, k64 = 0x42804280,
                       k71Half = 0x428F428F;  // bf16 64 + n has n in bits 1 to 4
    const uint32_t row_scales[2] = {(scales & 0xFFFF) * 0x10001, (scales >> 16) * 0x10001};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t biased = and_or(i == 0 ? word << 1 : word >> (4 * i - 1), kNibbles, k64);
      a[i] = multiply_bf16_pair(subtract_bf16_pair(biased, k71Half), row_scales[i % 2]);
    }
  }

  template <int N>
  static __device__ __forceinline__ void multiply_tile(float (&sums)[N / 2], const unsigned char* tile,
                                                       const unsigned char* tokens) {
    const int thread = threadIdx.x % 128;
    const uint4 nibbles = reinterpret_cast<const uint4*>(tile)[thread];
    const uint32_t scale_bytes = reinterpret_cast<const uint32_t*>(tile + kInt4NibbleBytes)[thread / 4];
    const uint32_t words[4] = {nibbles.x, nibbles.y, nibbles.z, nibbles.w};
    const uint32_t scales[2] = {int4_scales(scale_bytes & 0x00FF00FF), int4_scales(scale_bytes >> 8 & 0x00FF00FF)};
    uint32_t a[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) make_operand(a[k], words[k], scales[k / 2]);  // 16 depths each
    const uint64_t b = matrix_descriptor(shared_address(tokens));
    fence_accumulators();
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply_bf16<N, false>(sums, a[k], b + k * kDescriptorStep, true);
    commit_products();
    wait_products<0>();
  }

  template <bool kSwiglu, int N>
  static __device__ __forceinline__ void finish(float (&)[N / 2], const Source&, const StreamGemm&, const GemmTile&,
                                                int64_t) {}
};

// e4m3 weights with a scale for each row, e4m3 tokens with a scale each. The tensor cores keep fewer bits than f32 of a
// running sum of e4m3 products: every 128 depths it is added to one in f32 by other units.
struct E4m3Weights {
  struct Source {
    TensorMap map;
    const float* weight_scales;  // [experts, rows of weights]
    const float* token_scales;   // [rows]
  };
  static constexpr int kDepth = 128, kTileBytes = kStreamTileRows * kSwizzleRowBytes, kTokenBytes = 1;

  template <bool kSwiglu, int kGroups>
  static __device__ __forceinline__ void load(unsigned char* shared, Barrier* full, const Source& source,
                                              const StreamGemm&, const GemmTile& unit, int step) {
    load_weight_boxes<kSwiglu, kGroups>(shared, full, source.map, unit, step * kDepth);
  }

  template <int N>
  static __device__ __forceinline__ void multiply_tile(float (&sums)[N / 2], const unsigned char* tile,
                                                       const unsigned char* tokens) {
    const uint64_t a = matrix_descriptor(shared_address(tile)), b = matrix_descriptor(shared_address(tokens));
    float part[N / 2] = {};
    keep_order(part);
    fence_accumulators();
#pragma unroll
    for (int k = 0; k < 4; ++k)  // 32 depths each
      multiply_e4m3<N>(part, a + k * kDescriptorStep, b + k * kDescriptorStep, true);
    commit_products();
    wait_products<0>();
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] += part[i];
  }

  template <bool kSwiglu, int N>
  static __device__ __forceinline__ void finish(float (&sums)[N / 2], const Source& source, const StreamGemm& gemm,
                                                const GemmTile& unit, int64_t tile) {
    const int thread = threadIdx.x % 128;
    const int64_t weight_rows = gemm.columns * (kSwiglu ? 2 : 1);
    float weight_scales[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = stream_weight_row(gemm.columns, kSwiglu, tile, accumulator_row(thread, half * 2));
      weight_scales[half] = row < weight_rows ? source.weight_scales[unit.expert * weight_rows + row] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int64_t token = unit.row_begin + accumulator_column(thread, i);
      const float scale = token < unit.row_end ? source.token_scales[token] : 0.0f;
      sums[i] *= scale * weight_scales[i / 2 % 2];
    }
  }
};

}  // namespace mixtral::cuda
