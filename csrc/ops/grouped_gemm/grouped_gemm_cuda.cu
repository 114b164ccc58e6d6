// One block per output tile. The grid covers every way in which offs could cut the rows (tiles.h), so the host never
// reads offs: a block looks up its own tile, or finds that there is none.
//
// bf16, f16: 64x128 tiles, four warps of 32x64, mma.sync m16n8k16 fed by ldmatrix from a cp.async pipeline of three
// stages. Rows of shared memory are 80 bytes apart: the eight rows that one ldmatrix reads fall into different banks.
// f32: 64x64 tiles, 4x4 values per thread, fused multiply-adds, in chains of 256 products as on the CPU: one long chain
// would err several times as much as products that split the depth.
// Both add the products of an output in the order of k, for any number of rows.
#include <climits>
#include <type_traits>

#include "../cuda/common.cuh"
#include "grouped_gemm.h"
#include "tiles.h"

namespace mixtral {
namespace {

using namespace cuda;

// Rows of one operand as a block sees them: row 0 is the first of its tile, rows beyond `rows` read as zero.
template <typename T>
struct Operand {
  const T* data;
  int64_t rows, depth;
  bool aligned;  // 16-byte loads are possible: base and row length are multiples of 16 bytes
};

template <typename T>
__device__ Operand<T> operand(const T* base, int64_t first_row, int64_t rows, int64_t depth) {
  const T* data = base + first_row * depth;
  return {data, rows, depth, reinterpret_cast<uintptr_t>(base) % 16 == 0 && depth * sizeof(T) % 16 == 0};
}

// Zeros for the rows after the last group.
template <typename T, int Columns>
__device__ void clear_tile(const GroupedGemm<T>& gemm, const GemmTile& tile) {
  const int64_t column = tile.column_block * Columns + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= Columns || column >= gemm.b.columns) return;
  for (int64_t r = tile.row_begin; r < tile.row_end; ++r) gemm.out[r * gemm.b.columns + column] = from_float<T>(0.0f);
}

// ---- bf16, f16

constexpr int kMmaThreads = 128, kMmaRows = 64, kMmaColumns = 128, kMmaDepth = 32, kStages = 3, kPitch = kMmaDepth + 8;
constexpr int kWarpRows = 32, kWarpColumns = 64, kRowFragments = kWarpRows / 16, kColumnFragments = kWarpColumns / 8;

template <typename T>
struct MmaPanels {
  T a[kMmaRows * kPitch];
  T b[kMmaColumns * kPitch];
};

// Copies 16 bytes when `valid`, else writes 16 zero bytes; arrives with the thread's commit group.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0));
}

// Columns [k, k + kMmaDepth) of Rows rows -> panel [Rows, kPitch].
template <int Rows, typename T>
__device__ __forceinline__ void load_panel(const Operand<T>& source, int64_t k, T* panel) {
  constexpr int kChunk = 16 / sizeof(T), kChunksPerRow = kMmaDepth / kChunk;
#pragma unroll
  for (int i = threadIdx.x; i < Rows * kChunksPerRow; i += kMmaThreads) {
    const int row = i / kChunksPerRow, column = i % kChunksPerRow * kChunk;
    T* target = panel + row * kPitch + column;
    if (source.aligned) {
      const bool valid = row < source.rows && k + column < source.depth;
      copy_async_16(target, valid ? source.data + row * source.depth + k + column : source.data, valid);
    } else {
      for (int j = 0; j < kChunk; ++j) {
        const bool valid = row < source.rows && k + column + j < source.depth;
        target[j] = valid ? source.data[row * source.depth + k + column + j] : from_float<T>(0.0f);
      }
    }
  }
}

__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], const void* shared) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address));
}

template <typename T>
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// One panel pair into the sums of this warp.
template <typename T>
__device__ __forceinline__ void multiply_panels(const MmaPanels<T>& panels, int warp_row, int warp_column,
                                                float (&sums)[kRowFragments][kColumnFragments][4]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < kMmaDepth; k += 16) {
    uint32_t a[kRowFragments][4];
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r)
      load_matrices(a[r], panels.a + (warp_row + r * 16 + lane % 16) * kPitch + k + lane / 16 * 8);
#pragma unroll
    for (int c = 0; c < kColumnFragments; c += 2) {
      // Four 8x8 matrices: columns c and c + 1 of fragments, both halves of k.
      uint32_t b[4];
      load_matrices(b, panels.b + (warp_column + c * 8 + lane / 16 * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
#pragma unroll
      for (int r = 0; r < kRowFragments; ++r) {
        mma<T>(sums[r][c], a[r], b[0], b[1]);
        mma<T>(sums[r][c + 1], a[r], b[2], b[3]);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_sums(const GroupedGemm<T>& gemm, const GemmTile& tile, int warp_row,
                                           int warp_column, const float (&sums)[kRowFragments][kColumnFragments][4]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int r = 0; r < kRowFragments; ++r)
#pragma unroll
    for (int c = 0; c < kColumnFragments; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = tile.row_begin + warp_row + r * 16 + i / 2 * 8 + lane / 4;
        const int64_t column = tile.column_block * kMmaColumns + warp_column + c * 8 + lane % 4 * 2 + i % 2;
        if (row < tile.row_end && column < gemm.b.columns)
          gemm.out[row * gemm.b.columns + column] = from_float<T>(sums[r][c][i]);
      }
}

template <typename T>
__global__ void __launch_bounds__(kMmaThreads) grouped_gemm_mma_kernel(GroupedGemm<T> gemm) {
  __shared__ alignas(16) unsigned char memory[kStages * sizeof(MmaPanels<T>)];  // T has constructors: no shared T
  MmaPanels<T>* stages = reinterpret_cast<MmaPanels<T>*>(memory);
  const GemmTile tile =
      find_gemm_tile(gemm.offs, gemm.b.experts, gemm.rows, kMmaRows, ceil_div(gemm.b.columns, kMmaColumns), blockIdx.x);
  if (tile.expert < 0) return;
  if (tile.expert == gemm.b.experts) return clear_tile<T, kMmaColumns>(gemm, tile);

  const int64_t column = tile.column_block * kMmaColumns;
  const Operand<T> a = operand(gemm.a, tile.row_begin, tile.row_end - tile.row_begin, gemm.b.depth);
  const Operand<T> b = operand(static_cast<const T*>(gemm.b.data), tile.expert * gemm.b.columns + column,
                               gemm.b.columns - column, gemm.b.depth);
  const int warp = threadIdx.x / kWarpSize;
  const int warp_row = warp / 2 * kWarpRows, warp_column = warp % 2 * kWarpColumns;
  const int64_t panels = ceil_div(gemm.b.depth, kMmaDepth);
  float sums[kRowFragments][kColumnFragments][4] = {};

  // Every iteration commits one group, an empty one after the end, so that "all but the newest" is always the right
  // wait.
  const auto load_stage = [&](int64_t p) {
    if (p < panels) {
      load_panel<kMmaRows>(a, p * kMmaDepth, stages[p % kStages].a);
      load_panel<kMmaColumns>(b, p * kMmaDepth, stages[p % kStages].b);
    }
    asm volatile("cp.async.commit_group;");
  };
  for (int64_t p = 0; p < kStages - 1; ++p) load_stage(p);
  for (int64_t p = 0; p < panels; ++p) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2));
    __syncthreads();  // panel p is here for all, and all are done with the stage that is filled next
    load_stage(p + kStages - 1);
    multiply_panels(stages[p % kStages], warp_row, warp_column, sums);
  }
  store_sums(gemm, tile, warp_row, warp_column, sums);
}

// ---- f32

constexpr int kFmaThreads = 256, kFmaTile = 64, kFmaDepth = 16, kFmaPitch = kFmaTile + 4, kPerThread = 4;

// Columns [k, k + kFmaDepth) of 64 rows -> panel [kFmaDepth, kFmaPitch], transposed.
__device__ __forceinline__ void load_transposed(const Operand<float>& source, int64_t k, float* panel) {
  for (int i = threadIdx.x; i < kFmaTile * kFmaDepth; i += kFmaThreads) {
    const int row = i / kFmaDepth, column = i % kFmaDepth;
    const bool valid = row < source.rows && k + column < source.depth;
    panel[column * kFmaPitch + row] = valid ? source.data[row * source.depth + k + column] : 0.0f;
  }
}

__global__ void __launch_bounds__(kFmaThreads) grouped_gemm_fma_kernel(GroupedGemm<float> gemm) {
  __shared__ alignas(16) float a_panel[kFmaDepth * kFmaPitch], b_panel[kFmaDepth * kFmaPitch];
  const GemmTile tile =
      find_gemm_tile(gemm.offs, gemm.b.experts, gemm.rows, kFmaTile, ceil_div(gemm.b.columns, kFmaTile), blockIdx.x);
  if (tile.expert < 0) return;
  if (tile.expert == gemm.b.experts) return clear_tile<float, kFmaTile>(gemm, tile);

  const int64_t column = tile.column_block * kFmaTile;
  const Operand<float> a = operand(gemm.a, tile.row_begin, tile.row_end - tile.row_begin, gemm.b.depth);
  const Operand<float> b = operand(static_cast<const float*>(gemm.b.data), tile.expert * gemm.b.columns + column,
                                   gemm.b.columns - column, gemm.b.depth);
  const int thread_row = threadIdx.x / 16 * kPerThread, thread_column = threadIdx.x % 16 * kPerThread;
  float sums[kPerThread][kPerThread] = {};
  for (int64_t begin = 0; begin < gemm.b.depth; begin += kChainDepth) {
    const int64_t end = min(begin + kChainDepth, gemm.b.depth);
    float chain[kPerThread][kPerThread] = {};
    for (int64_t k = begin; k < end; k += kFmaDepth) {
      __syncthreads();  // the previous panels have been read
      load_transposed(a, k, a_panel);
      load_transposed(b, k, b_panel);
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kFmaDepth; ++d) {
        const float4 left = *reinterpret_cast<const float4*>(a_panel + d * kFmaPitch + thread_row);
        const float4 right = *reinterpret_cast<const float4*>(b_panel + d * kFmaPitch + thread_column);
        const float left_values[] = {left.x, left.y, left.z, left.w};
        const float right_values[] = {right.x, right.y, right.z, right.w};
#pragma unroll
        for (int r = 0; r < kPerThread; ++r)
#pragma unroll
          for (int c = 0; c < kPerThread; ++c) chain[r][c] = fmaf(left_values[r], right_values[c], chain[r][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < kPerThread; ++r)
#pragma unroll
      for (int c = 0; c < kPerThread; ++c) sums[r][c] += chain[r][c];
  }
#pragma unroll
  for (int r = 0; r < kPerThread; ++r)
#pragma unroll
    for (int c = 0; c < kPerThread; ++c) {
      const int64_t row = tile.row_begin + thread_row + r, n = column + thread_column + c;
      if (row < tile.row_end && n < gemm.b.columns) gemm.out[row * gemm.b.columns + n] = sums[r][c];
    }
}

}  // namespace

template <typename T>
int launch_grouped_gemm_cuda(const GroupedGemm<T>& gemm, cudaStream_t stream) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  const int64_t tiles = max_gemm_tiles(gemm.b.experts, gemm.rows, kFloat ? kFmaTile : kMmaRows,
                                       ceil_div(gemm.b.columns, kFloat ? kFmaTile : kMmaColumns));
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT_MAX) return cudaErrorInvalidConfiguration;
  if constexpr (kFloat)
    grouped_gemm_fma_kernel<<<static_cast<unsigned>(tiles), kFmaThreads, 0, stream>>>(gemm);
  else
    grouped_gemm_mma_kernel<<<static_cast<unsigned>(tiles), kMmaThreads, 0, stream>>>(gemm);
  return cudaGetLastError();
}

template int launch_grouped_gemm_cuda(const GroupedGemm<float>&, cudaStream_t);
template int launch_grouped_gemm_cuda(const GroupedGemm<BFloat16>&, cudaStream_t);
template int launch_grouped_gemm_cuda(const GroupedGemm<Half>&, cudaStream_t);

}  // namespace mixtral
