// One thread has one key/value head of one sequence. For a tile of query rows, one block of 64 keys after the other,
// with queries as columns of the scores (the superscript T):
//
//   S^T = K Q^T,  dP^T = V dO^T,  P^T and dS^T by element,  dQ^T += K^T dS^T,  dV += P^T dO,  dK += dS^T Q
//
// So lse and D are vectors along a row, P^T and dS^T are left operands as they lie, and all five products are those of
// the micro-kernels of cpu/matmul.h. The right operands, Q and dO by column and by row, are packed once for a tile.
//
// Tiles are counted from the beginning of a sequence, so the sums of a sequence have the same order for any neighbours
// and threads: those of dK and dV run over the rows of a tile, tile after tile; those of dQ over the keys of a block,
// block after block. D is the diagonal of dO out^T, in the order of dP: where a query sees one key, they cancel.
//
// 0 * NaN is NaN: rows of Q, dO and K that are not finite become zeros where they meet a weight. A query with such a
// row of Q or dO gets the lse NaN, which reaches the gradients of all keys that it sees, and no others.
//
// Bound, for Mixtral (4 query heads a key head of 128 values): a pair of query and key costs 5 x 128 FMAs, forward
// 2 x 128.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "../cpu/buffer.h"
#include "../cpu/matmul.h"
#include "../cpu/shared_work.h"
#include "../cpu/simd.h"
#include "pack_queries.h"
#include "sliding_window_attention_backward.h"

namespace mixtral {
namespace {

using namespace cpu;

constexpr int64_t kBlockElements = kKeyBlock * kPanelColumns;

// Memory that each thread keeps from call to call.
template <typename Operand>
struct Scratch {
  Buffer<Operand> q_by_column, q_by_row, grad_by_column, grad_by_row, rows, k, v, k_transposed, p, ds, ds_panel;
  Buffer<float> sum_q, lse, delta;
  Buffer<KeyRange> seen;
};

// The work of one thread. Row r of a tile is query token r / group, head r % group of the group. 32 rows at a time are
// a panel: columns of the scores.
template <typename T, typename Operand>
class HeadWorker {
 public:
  HeadWorker(const AttentionBackwardProblem<T>& problem, MicroKernel<Operand> multiply, Scratch<Operand>& scratch)
      : problem_(problem),
        p_(problem.forward),
        multiply_(multiply),
        group_(p_.num_heads / p_.num_kv_heads),
        width_(round_up(p_.head_dim, kPanelColumns)),
        max_rows_(round_up(group_ * std::min(p_.tile_tokens(), p_.tokens), kPanelColumns)),
        q_by_column_(scratch.q_by_column.grow(max_rows_ * width_)),
        q_by_row_(scratch.q_by_row.grow(max_rows_ * width_)),
        grad_by_column_(scratch.grad_by_column.grow(max_rows_ * width_)),
        grad_by_row_(scratch.grad_by_row.grow(max_rows_ * width_)),
        rows_(scratch.rows.grow(3 * kPanelColumns * width_)),
        k_(scratch.k.grow((kKeyBlock + 1) * width_)),
        v_(scratch.v.grow(kKeyBlock * width_)),
        k_transposed_(scratch.k_transposed.grow(width_ * kKeyBlock)),
        weights_(scratch.p.grow(kKeyBlock * max_rows_)),
        ds_(scratch.ds.grow(kKeyBlock * max_rows_)),
        ds_panel_(scratch.ds_panel.grow(kBlockElements)),
        sum_q_(scratch.sum_q.grow(max_rows_ * width_)),
        lse_(scratch.lse.grow(max_rows_)),
        delta_(scratch.delta.grow(max_rows_)),
        seen_(scratch.seen.grow(max_rows_)) {}

  MIXTRAL_INLINE void run(int64_t sequence, int64_t kv_head) {
    sequence_ = sequence;
    kv_head_ = kv_head;
    const int64_t first = p_.keys.cu_seqlens[sequence], length = p_.keys.length(sequence);
    sum_k_ = problem_.sum_k + (kv_head * p_.keys.page_size + first) * width_;
    sum_v_ = problem_.sum_v + (kv_head * p_.keys.page_size + first) * width_;
    std::fill_n(sum_k_, length * width_, 0.0f);
    std::fill_n(sum_v_, length * width_, 0.0f);
    const int64_t end = p_.cu_seqlens_q[sequence + 1];
    for (int64_t token = p_.cu_seqlens_q[sequence]; token < end; token += p_.tile_tokens())
      run_tile(token, std::min(end, token + p_.tile_tokens()));
    for (int64_t j = 0; j < length; ++j) {
      const int64_t to = key_offset(j);
      for (int64_t d = 0; d < p_.head_dim; ++d) {
        problem_.grad_k[to + d] = from_float<T>(sum_k_[j * width_ + d] * p_.scale);
        problem_.grad_v[to + d] = from_float<T>(sum_v_[j * width_ + d]);
      }
    }
  }

 private:
  int64_t query_offset(int64_t r) const {
    return ((first_token_ + r / group_) * p_.num_heads + kv_head_ * group_ + r % group_) * p_.head_dim;
  }

  int64_t key_offset(int64_t key) const {
    return (p_.keys.row(sequence_, key) * p_.num_kv_heads + kv_head_) * p_.head_dim;
  }

  // Query tokens [begin, end)
  MIXTRAL_INLINE void run_tile(int64_t begin, int64_t end) {
    first_token_ = begin;
    tile_rows_ = (end - begin) * group_;
    padded_rows_ = round_up(tile_rows_, kPanelColumns);
    for (int64_t r = 0; r < padded_rows_; r += kPanelColumns) load_queries(r);
    std::fill_n(sum_q_, padded_rows_ * width_, 0.0f);
    const int64_t last_key = seen_[tile_rows_ - 1].end;
    for (int64_t start = seen_[0].begin; start < last_key; start += kKeyBlock) {
      load_keys(start, std::min(kKeyBlock, last_key - start));
      add_block(start);
    }
    for (int64_t r = 0; r < padded_rows_; r += kPanelColumns) store_queries(r);
  }

  // The panel of rows r to r + 31
  MIXTRAL_INLINE void load_queries(int64_t r) {
    Operand *q = rows_, *grad = q + kPanelColumns * width_, *out = grad + kPanelColumns * width_;
    const Operand *q_rows[kPanelColumns], *grad_rows[kPanelColumns];
    for (int64_t i = 0; i < kPanelColumns; ++i, q += width_, grad += width_, out += width_) {
      const bool exists = r + i < tile_rows_;
      const int64_t from = exists ? query_offset(r + i) : 0, size = exists ? p_.head_dim : 0;
      convert_row(p_.q + from, size, width_, q);
      convert_row(problem_.grad + from, size, width_, grad);
      convert_row(problem_.out + from, size, width_, out);
      q_rows[i] = q;
      grad_rows[i] = grad;
      const int64_t token = first_token_ + (r + i) / group_;
      seen_[r + i] = exists ? p_.visible(sequence_, token) : KeyRange{0, 0};
      lse_[r + i] = exists ? problem_.lse[(kv_head_ * group_ + (r + i) % group_) * p_.tokens + token] : 0.0f;
      if (is_finite(q, width_) && is_finite(grad, width_)) continue;
      std::fill_n(q, width_, Operand(0.0f));
      std::fill_n(grad, width_, Operand(0.0f));
      lse_[r + i] = std::numeric_limits<float>::quiet_NaN();
    }
    RowsAhead none;
    pack_keys(q_rows, none, width_, q_by_column_ + r * width_);
    pack_keys(grad_rows, none, width_, grad_by_column_ + r * width_);
    for (int64_t d = 0; d < width_; d += kPanelColumns) {
      pack_depth(q_rows, kPanelColumns, d, q_by_row_ + d * max_rows_ + r * kPanelColumns);
      pack_depth(grad_rows, kPanelColumns, d, grad_by_row_ + d * max_rows_ + r * kPanelColumns);
    }
    float products[kPanelColumns * kPanelColumns] = {};
    multiply_rows(rows_ + 2 * kPanelColumns * width_, kPanelColumns, grad_by_column_ + r * width_, products);
    for (int64_t i = 0; i < kPanelColumns; ++i) delta_[r + i] = products[i * kPanelColumns + i];
  }

  // `count` keys from `start` on, and zeros up to 64 of them in k_transposed.
  MIXTRAL_INLINE void load_keys(int64_t start, int64_t count) {
    const Operand* zeros = k_ + kKeyBlock * width_;  // a new buffer is zero, and nothing writes to this row
    const Operand* rows[kKeyBlock];
    for (int64_t j = 0; j < kKeyBlock; ++j) {
      rows[j] = zeros;
      if (j >= count) continue;
      const int64_t from = key_offset(start + j);
      convert_row(p_.k + from, p_.head_dim, width_, k_ + j * width_);
      convert_row(p_.v + from, p_.head_dim, width_, v_ + j * width_);
      if (is_finite(k_ + j * width_, width_)) rows[j] = k_ + j * width_;
    }
    transpose(rows, width_, k_transposed_);
    keys_ = count;
  }

  // Panels that see a key of the block are neighbours, since the ranges of keys begin and end in order.
  MIXTRAL_INLINE void add_block(int64_t start) {
    int64_t begin = padded_rows_, end = 0;
    for (int64_t r = 0; r < tile_rows_; r += kPanelColumns) {
      const int64_t last = std::min(r + kPanelColumns, tile_rows_) - 1;
      const int64_t first_key = std::max(seen_[r].begin - start, int64_t{0});
      const int64_t last_key = std::min(seen_[last].end - start, keys_);
      if (first_key >= last_key) continue;
      add_panel(start, r, first_key, last_key);
      begin = std::min(begin, r);
      end = r + kPanelColumns;
    }
    for (int64_t d = 0; d < width_; d += kPanelColumns) {
      const int64_t panel = d * max_rows_ + begin * kPanelColumns;
      multiply_(weights_ + begin, max_rows_, keys_, grad_by_row_ + panel, end - begin, sum_v_ + start * width_ + d,
                width_);
      multiply_(ds_ + begin, max_rows_, keys_, q_by_row_ + panel, end - begin, sum_k_ + start * width_ + d, width_);
    }
  }

  // products [count, 32] += rows [count, width] * panel. An error of a score is one of all gradients: short sums have
  // smaller ones.
  MIXTRAL_INLINE void multiply_rows(const Operand* rows, int64_t count, const Operand* panel, float* products) {
    for (int64_t d = 0; d < width_; d += kStepDepth)
      multiply_(rows + d, width_, count, panel + d * kPanelColumns, kStepDepth, products, kPanelColumns);
  }

  // Rows r to r + 31 and the keys [first, last) of the block
  MIXTRAL_INLINE void add_panel(int64_t start, int64_t r, int64_t first, int64_t last) {
    float scores[kBlockElements], dp[kBlockElements];
    const int64_t begin = first * kPanelColumns, count = last - first;
    std::fill_n(scores + begin, count * kPanelColumns, 0.0f);
    std::fill_n(dp + begin, count * kPanelColumns, 0.0f);
    multiply_rows(k_ + first * width_, count, q_by_column_ + r * width_, scores + begin);
    multiply_rows(v_ + first * width_, count, grad_by_column_ + r * width_, dp + begin);
    int32_t seen[2][kPanelColumns];
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      seen[0][c] = static_cast<int32_t>(std::clamp(seen_[r + c].begin - start, int64_t{0}, kKeyBlock));
      seen[1][c] = static_cast<int32_t>(std::clamp(seen_[r + c].end - start, int64_t{0}, kKeyBlock));
    }
    for (int64_t j = 0; j < kKeyBlock; ++j) {
      if (j >= first && j < last) continue;
      std::fill_n(weights_ + j * max_rows_ + r, kPanelColumns, Operand(0.0f));
      std::fill_n(ds_ + j * max_rows_ + r, kPanelColumns, Operand(0.0f));
    }
    weights_and_gradients(scores, dp, first, last, seen, p_.scale, lse_ + r, delta_ + r, max_rows_, weights_ + r,
                          ds_ + r);
    const int64_t from = first / kStepDepth * kStepDepth, depth = round_up(last, kStepDepth) - from;
    const Operand* ds_rows[kKeyBlock];
    for (int64_t j = 0; j < depth; ++j) ds_rows[j] = ds_ + (from + j) * max_rows_;
    pack_depth(ds_rows, depth, r, ds_panel_);
    multiply_(k_transposed_ + from, kKeyBlock, width_, ds_panel_, depth, sum_q_ + r * width_, kPanelColumns);
  }

  MIXTRAL_INLINE void store_queries(int64_t r) {
    const float* sums = sum_q_ + r * width_;  // [width, 32]
    for (int64_t i = 0; i < std::min(kPanelColumns, tile_rows_ - r); ++i) {
      T* to = problem_.grad_q + query_offset(r + i);
      for (int64_t d = 0; d < p_.head_dim; ++d) to[d] = from_float<T>(sums[d * kPanelColumns + i] * p_.scale);
    }
  }

  const AttentionBackwardProblem<T>& problem_;
  const AttentionProblem<T>& p_;
  const MicroKernel<Operand> multiply_;
  const int64_t group_, width_, max_rows_;
  // Panels of the rows of a tile: [rows/32][width, 32] by column, [width/32][max_rows, 32] by row.
  Operand *const q_by_column_, *const q_by_row_, *const grad_by_column_, *const grad_by_row_;
  Operand* const rows_;                        // [3, 32, width]
  Operand *const k_, *const v_;                // [64, width]; after the last key, a row of zeros
  Operand* const k_transposed_;                // [width, 64]
  Operand *const weights_, *const ds_;         // [64, max_rows]
  Operand* const ds_panel_;                    // [64, 32]
  float* const sum_q_;                         // [rows/32][width, 32]
  float *const lse_, *const delta_;            // [rows]
  KeyRange* const seen_;                       // [rows]
  float *sum_k_ = nullptr, *sum_v_ = nullptr;  // [keys of the sequence, width]
  int64_t sequence_ = 0, kv_head_ = 0, first_token_ = 0, tile_rows_ = 0, padded_rows_ = 0, keys_ = 0;
};

template <typename Operand, typename T>
void run_items(const AttentionBackwardProblem<T>& problem, MicroKernel<Operand> multiply, SharedWork& items) {
  static thread_local Scratch<Operand> scratch;
  for_cpu_isa([&] {
    HeadWorker<T, Operand> worker(problem, multiply, scratch);
    for (auto share = items.take(); share.begin < share.end; share = items.take())
      worker.run(share.begin / problem.forward.num_kv_heads, share.begin % problem.forward.num_kv_heads);
  });
  release_tiles();
}

}  // namespace

template <typename T>
void launch_attention_backward_cpu(const AttentionBackwardProblem<T>& problem, SharedWork& items) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (bf16_kernel() != nullptr) return run_items<BFloat16>(problem, bf16_kernel(), items);
  run_items<float>(problem, f32_kernel(), items);
}

template void launch_attention_backward_cpu(const AttentionBackwardProblem<float>&, SharedWork&);
template void launch_attention_backward_cpu(const AttentionBackwardProblem<BFloat16>&, SharedWork&);
template void launch_attention_backward_cpu(const AttentionBackwardProblem<Half>&, SharedWork&);

}  // namespace mixtral
