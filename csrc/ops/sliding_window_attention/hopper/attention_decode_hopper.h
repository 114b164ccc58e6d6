// Attention of few query tokens per sequence on Hopper: the problems that the kernel can compute, how it divides them,
// and the layout of its memory. All of it follows from shapes alone, so a launch can be captured in a CUDA graph.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <limits>

#include "../../cuda/hopper_layout.h"
#include "../sliding_window_attention.h"

namespace mixtral {

using DecodeProblem = AttentionProblem<torch::headeronly::BFloat16>;

// Query rows are pairs (token, query head of one key/value head), token by token, in tiles of 16 for the tensor cores.
inline constexpr int kDecodeTileRows = 16, kMaxDecodeRows = 64;
// Keys pass by in blocks, aligned to absolute positions.
inline constexpr int kDecodeKeys = 64;

struct DecodePlan {
  int rows;             // query rows of a block: 16, 32 or 64
  int splits;           // blocks that share the keys of a query tile
  int64_t tile_tokens;  // query tokens of a block
  int64_t tiles;        // query tiles of the batch, some empty (query_tile)
};

// The most keys that one query can see, by shapes.
constexpr int64_t decode_keys_bound(const DecodeProblem& p) {
  const int64_t cached = p.keys.page_table ? p.keys.columns * p.keys.page_size : std::numeric_limits<int64_t>::max();
  return p.window > 0 && p.window < cached ? p.window : cached;
}

// Two on each multiprocessor. Their number is a constant, that of H100 and H200, so that all of them give the same
// bits.
inline constexpr int64_t kDecodeBlocksAtOnce = 2 * 132;

// Splits fill the GPU once, unless a split would have less than 256 keys.
constexpr DecodePlan decode_plan(const DecodeProblem& p) {
  constexpr int64_t kLeastKeys = 256, kMaxSplits = 32;
  const int64_t group = p.num_heads / p.num_kv_heads, tokens = ceil_div(p.tokens, p.sequences);
  int rows = kDecodeTileRows;
  while (rows < tokens * group && rows < kMaxDecodeRows) rows *= 2;
  int64_t splits = kDecodeBlocksAtOnce / (p.sequences * p.num_kv_heads);
  const int64_t most = (decode_keys_bound(p) - 1) / kLeastKeys + 1;  // the sum of ceil_div could overflow
  splits = splits < most ? splits : most;
  splits = splits < 1 ? 1 : splits < kMaxSplits ? splits : kMaxSplits;
  return {rows, static_cast<int>(splits), rows / group, num_query_tiles(p.tokens, p.sequences, rows / group)};
}

// Few query tokens per sequence: on average, since only sums are known without a look at device memory. A sequence with
// more tokens than a tile is computed correctly too; its keys are read once per tile.
constexpr bool decode_shapes_fit(const DecodeProblem& p) {
  if (p.tokens == 0 || p.num_heads == 0 || (p.head_dim != 64 && p.head_dim != 128)) return false;
  const int64_t group = p.num_heads / p.num_kv_heads, tokens = ceil_div(p.tokens, p.sequences);
  return tokens * group <= kMaxDecodeRows;
}

inline bool takes_attention_decode_hopper(const DecodeProblem& p) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return decode_shapes_fit(p) && aligned(p.q) && aligned(p.k) && aligned(p.v) && aligned(p.out);
}

// A partial result: of every row, the weighted sum of values (head_dim floats), the maximum of its scores in base 2 and
// the sum of its weights. The padding keeps rows in different banks of shared memory.
constexpr int decode_part_stride(int head_dim) { return head_dim + 8; }

// The parts of the splits, until the last block merges them.
struct DecodeWorkspace {
  int* arrivals;  // [tiles, Nkv], at most kMaxDecodeArrivals; 0 before a launch and after it
  float* parts;   // [tiles, Nkv, splits, rows, stride]
};

// With two splits or more, B Nkv is at most half of the blocks at once; and there are at most 2 B tiles, since a tile
// holds the tokens of an average sequence.
inline constexpr int64_t kMaxDecodeArrivals = kDecodeBlocksAtOnce;

constexpr int64_t decode_arrival_bytes(const DecodeProblem& p, const DecodePlan& plan) {
  return round_up(plan.tiles * p.num_kv_heads * static_cast<int64_t>(sizeof(int)), 16);
}

// 0: none is needed.
constexpr int64_t decode_workspace_bytes(const DecodeProblem& p, const DecodePlan& plan) {
  if (plan.splits == 1) return 0;
  const int64_t rows = plan.tiles * p.num_kv_heads * plan.splits * plan.rows;
  return decode_arrival_bytes(p, plan) +
         rows * decode_part_stride(static_cast<int>(p.head_dim)) * static_cast<int64_t>(sizeof(float));
}

inline DecodeWorkspace decode_workspace(const DecodeProblem& p, const DecodePlan& plan, void* memory) {
  if (plan.splits == 1) return {nullptr, nullptr};
  unsigned char* bytes = static_cast<unsigned char*>(memory);
  return {reinterpret_cast<int*>(bytes), reinterpret_cast<float*>(bytes + decode_arrival_bytes(p, plan))};
}

// Blocks of keys [begin, end) that a split works on: an even share of those that hold a key of `range`.
struct KeyBlocks {
  int64_t begin, end;
};
constexpr KeyBlocks split_blocks(const KeyRange& range, int split, int splits) {
  if (range.begin >= range.end) return {0, 0};
  const int64_t first = range.begin / kDecodeKeys, blocks = ceil_div(range.end, kDecodeKeys) - first;
  return {first + blocks * split / splits, first + blocks * (split + 1) / splits};
}

// Byte offset of a 16-byte chunk of a key in a tile of shared memory. Chunks are exchanged by the number of the key, so
// that the eight rows of a matrix fragment lie in different banks.
template <int kHeadDim>
constexpr int decode_tile_offset(int key, int chunk) {
  return key * kHeadDim * 2 + (chunk ^ key % 8) * 16;
}

// `workspace` has decode_workspace_bytes(problem, decode_plan(problem)), aligned to 16 bytes, with any contents.
// Returns a cudaError_t.
int launch_attention_decode_hopper(const DecodeProblem& problem, void* workspace, cudaStream_t stream);

}  // namespace mixtral
