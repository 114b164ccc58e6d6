// sliding_window_attention: out[i] = sum_j softmax_j(scale * q[i].k[j]) v[j] over the keys j of the same sequence with
// 0 <= i - j < W. Queries are aligned to the end of their sequence: with Lq queries and Lk keys, query i sits at
// position i + Lk - Lq. A query that sees no key gives zeros.
//
// Windows as in Beltagy et al., "Longformer" (2020) and Jiang et al., "Mistral 7B" (2023); the softmax is the online
// one of Milakov and Gimelshein (2018), over blocks of keys, in f32. rolling_kv_cache_attention is the same computation
// with the keys in pages: it calls attend() too.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"
#include "attention_index.h"

namespace mixtral {

namespace cpu {
class SharedWork;  // ../cpu/shared_work.h
}

template <typename T>
struct AttentionProblem {
  const T* q;                   // [T, Nq, D]
  const T* k;                   // [rows, Nkv, D], rows as KeyLayout::row gives them
  const T* v;                   // [rows, Nkv, D]
  T* out;                       // [T, Nq, D]
  const int64_t* cu_seqlens_q;  // [B + 1]
  KeyLayout keys;
  int64_t tokens, sequences, num_heads, num_kv_heads, head_dim;
  int64_t window;  // 0: none
  bool causal;
  float scale;
  float* lse =
      nullptr;  // [Nq, T], if the backward pass will need it: log sum_j exp(scale * q.k_j) of the keys in sight

  // The key range of query row `token` of `sequence`.
  constexpr KeyRange visible(int64_t sequence, int64_t token) const {
    const int64_t length = keys.length(sequence);
    return visible_keys(token - cu_seqlens_q[sequence + 1] + length, length, window, causal);
  }

  // Whether a tile has queries, and all of them are in q: on CUDA cu_seqlens_q is unchecked.
  constexpr bool holds(const QueryTile& tile) const {
    return tile.begin >= 0 && tile.begin < tile.end && tile.end <= tokens;
  }

  // CPU: a work item is one tile of so many query tokens of a sequence, for the query heads of one key/value head.
  // Some 256 rows share the keys that are packed for them.
  constexpr int64_t tile_tokens() const { return num_heads / num_kv_heads < 256 ? 256 * num_kv_heads / num_heads : 1; }
  constexpr int64_t num_items() const { return num_query_tiles(tokens, sequences, tile_tokens()) * num_kv_heads; }
};

// The share of one of the threads that call this with the same `items`, SharedWork::of_items(problem.num_items()).
template <typename T>
void launch_attention_cpu(const AttentionProblem<T>& problem, cpu::SharedWork& items);

// head_dim is at most kMaxHeadDimCuda.
inline constexpr int64_t kMaxHeadDimCuda = 256;
template <typename T>
int launch_attention_cuda(const AttentionProblem<T>& problem, cudaStream_t stream);

}  // namespace mixtral
