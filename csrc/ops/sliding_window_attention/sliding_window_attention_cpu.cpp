// For a tile of query rows, one key block of 64 keys after the other: scores = Q K^T, online softmax, acc = correction
// * acc + weights V. Both products use the micro-kernels of ../cpu/matmul.h, in bf16 if the processor has products of
// bf16, else in f32. There a row's bits do not depend on the rows beside it.
//
// Key blocks start at multiples of 64 of the absolute position, and a row is computed only with key blocks that hold a
// key it sees. So its sums run over the same key blocks in the same order for any neighbours, chunks and layout of the
// keys. A key that a row does not see has the weight 0, which does not change the sums as long as its value is finite.
#include <algorithm>
#include <type_traits>

#include "../cpu/buffer.h"
#include "../cpu/matmul.h"
#include "../cpu/shared_work.h"
#include "online_softmax.h"
#include "pack_keys.h"
#include "sliding_window_attention.h"

namespace mixtral {
namespace {

using namespace cpu;

// Memory that each thread keeps from call to call.
template <typename Operand>
struct Scratch {
  Buffer<Operand> q, weights, k_panels, v_panels, copies, zeros;
  Buffer<float> scores, acc;
  Buffer<SoftmaxState> states;
};

// The work of one thread, tile after tile. Row r of a tile is query token r / group, head r % group of the group.
template <typename T, typename Operand>
class TileWorker {
 public:
  TileWorker(const AttentionProblem<T>& problem, MicroKernel<Operand> kernel, Scratch<Operand>& scratch)
      : problem_(problem),
        multiply_(kernel),
        group_(problem_.num_heads / problem_.num_kv_heads),
        width_(round_up(problem_.head_dim, kPanelColumns)),
        rows_(group_ * std::min(problem_.tile_tokens(), problem_.tokens)),
        q_(scratch.q.grow(rows_ * width_)),
        weights_(scratch.weights.grow(rows_ * kKeyBlock)),
        k_panels_(scratch.k_panels.grow(kKeyBlock * width_)),
        v_panels_(scratch.v_panels.grow(kKeyBlock * width_)),
        copies_(scratch.copies.grow(2 * kKeyBlock * width_)),
        zeros_(scratch.zeros.grow(width_)),  // a new buffer is zero, and nothing writes to it
        scores_(scratch.scores.grow(rows_ * kKeyBlock)),
        acc_(scratch.acc.grow(rows_ * width_)),
        states_(scratch.states.grow(rows_)) {}

  MIXTRAL_INLINE void attend_tile(const QueryTile& tile, int64_t kv_head) {
    tile_ = tile;
    kv_head_ = kv_head;
    const int64_t tokens = tile.end - tile.begin;
    for (int64_t r = 0; r < tokens * group_; ++r) {
      convert_row(problem_.q + row_offset(r), problem_.head_dim, width_, q_ + r * width_);
      states_[r] = SoftmaxState{};
    }
    std::fill_n(acc_, tokens * group_ * width_, 0.0f);
    const int64_t first = visible(0).begin, last = visible(tokens - 1).end;
    for (int64_t block = first / kKeyBlock * kKeyBlock; block < last; block += kKeyBlock) attend_block(block, tokens);
    for (int64_t r = 0; r < tokens * group_; ++r) {
      const float sum = sum_lanes(states_[r].sum), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: no key was seen
      T* out = problem_.out + row_offset(r);
      for (int64_t d = 0; d < problem_.head_dim; ++d) out[d] = from_float<T>(acc_[r * width_ + d] * inverse);
    }
  }

 private:
  int64_t row_offset(int64_t r) const {
    return ((tile_.begin + r / group_) * problem_.num_heads + kv_head_ * group_ + r % group_) * problem_.head_dim;
  }

  KeyRange visible(int64_t token) const { return problem_.visible(tile_.sequence, tile_.begin + token); }

  // The keys of a block that `token` of the tile sees, counted from its start.
  KeyRange seen(int64_t block, int64_t token) const {
    const KeyRange keys = visible(token);
    return {std::clamp(keys.begin - block, int64_t{0}, kKeyBlock), std::clamp(keys.end - block, int64_t{0}, kKeyBlock)};
  }

  // For the tokens of the tile that see a key of the block. The ranges of keys that tokens see begin and end in order
  // and leave no gap: these tokens are neighbours, and every key between their first and their last one is seen.
  MIXTRAL_INLINE void attend_block(int64_t block, int64_t tokens) {
    int64_t begin = 0, end = tokens;
    while (begin < end && seen(block, begin).begin >= seen(block, begin).end) ++begin;
    while (begin < end && seen(block, end - 1).begin >= seen(block, end - 1).end) --end;
    const KeyRange first = seen(block, begin), last = seen(block, end - 1), all{first.begin, last.end};
    gather_rows(block, all);
    const bool alike = first.begin == last.begin && first.end == last.end;
    if (alike || rows_are_finite(v_rows_, all.begin, all.end, width_)) {
      attend_rows(block, begin, end, all);
      return;
    }
    // 0 * NaN is NaN: a token must not be multiplied with values that it does not see.
    for (int64_t token = begin; token < end; ++token) {
      const KeyRange own = seen(block, token);
      gather_rows(block, own);
      attend_rows(block, token, token + 1, own);
    }
  }

  // Rows of keys and values; zeros outside `keys`, where there may be no memory.
  MIXTRAL_INLINE void gather_rows(int64_t block, const KeyRange& keys) {
    std::fill_n(k_rows_, kKeyBlock, zeros_);
    std::fill_n(v_rows_, kKeyBlock, zeros_);
    for (int64_t j = keys.begin; j < keys.end;) {
      int64_t row = problem_.keys.row(tile_.sequence, block + j);
      for (const int64_t run_end = j + std::min(keys.end - j, problem_.keys.successive_keys(block + j)); j < run_end;
           ++j, ++row) {
        const int64_t offset = (row * problem_.num_kv_heads + kv_head_) * problem_.head_dim;
        k_rows_[j] = operand_row(problem_.k + offset, problem_.head_dim, width_, copies_ + j * width_);
        v_rows_[j] = operand_row(problem_.v + offset, problem_.head_dim, width_, copies_ + (kKeyBlock + j) * width_);
      }
    }
  }

  // Tokens [begin, end) with the gathered `keys` of the block. Halves of the block that no row sees are skipped.
  MIXTRAL_INLINE void attend_rows(int64_t block, int64_t begin, int64_t end, const KeyRange& keys) {
    const int64_t panel_begin = keys.begin / kPanelColumns;
    const int64_t panel_end = ceil_div(keys.end, kPanelColumns);
    const int64_t row = begin * group_, rows = (end - begin) * group_;
    pack_keys(k_rows_, panel_begin, panel_end, width_, k_panels_);
    std::fill_n(scores_ + row * kKeyBlock, rows * kKeyBlock, 0.0f);
    const int64_t score_depth =
        sizeof(Operand) == 4 ? 8 : width_;  // f32: several short sums have a smaller error than one
    for (int64_t panel = panel_begin; panel < panel_end; ++panel)
      for (int64_t d = 0; d < width_; d += score_depth)
        multiply_(q_ + row * width_ + d, width_, rows, k_panels_ + (panel * width_ + d) * kPanelColumns, score_depth,
                  scores_ + row * kKeyBlock + panel * kPanelColumns, kKeyBlock);
    for (int64_t r = row; r < row + rows; r += kSoftmaxRows) {
      const int64_t count = std::min(kSoftmaxRows, row + rows - r);
      KeyRange ranges[kSoftmaxRows];
      for (int64_t i = 0; i < count; ++i) ranges[i] = seen(block, (r + i) / group_);
      softmax_block(scores_ + r * kKeyBlock, ranges, count, problem_.scale, states_ + r, weights_ + r * kKeyBlock,
                    acc_ + r * width_, width_);
    }
    pack_values(v_rows_, panel_begin, panel_end, width_, v_panels_);
    const int64_t depth_begin = panel_begin * kStepDepth, depth = (panel_end - panel_begin) * kStepDepth;
    for (int64_t d = 0; d < width_; d += kPanelColumns)
      multiply_(weights_ + row * kKeyBlock + depth_begin, kKeyBlock, rows,
                v_panels_ + d * kKeyBlock + depth_begin * kPanelColumns, depth, acc_ + row * width_ + d, width_);
  }

  const AttentionProblem<T>& problem_;
  const MicroKernel<Operand> multiply_;
  const int64_t group_, width_, rows_;
  Operand* const q_;                    // [rows, width]
  Operand* const weights_;              // [rows, 64]
  Operand* const k_panels_;             // [2][width/32][1024]
  Operand* const v_panels_;             // [width/32][2][1024]
  Operand* const copies_;               // [2, 64, width]
  const Operand* const zeros_;          // [width]
  float* const scores_;                 // [rows, 64]
  float* const acc_;                    // [rows, width]
  SoftmaxState* const states_;          // [rows]
  BlockRows<Operand> k_rows_, v_rows_;  // of the block
  QueryTile tile_{};
  int64_t kv_head_ = 0;
};

template <typename T, typename Operand>
void attend_items(const AttentionProblem<T>& p, MicroKernel<Operand> kernel, SharedWork& items) {
  const int64_t tiles = num_query_tiles(p.tokens, p.sequences, p.tile_tokens());
  static thread_local Scratch<Operand> scratch;
  for_cpu_isa([&] {
    TileWorker<T, Operand> worker(p, kernel, scratch);
    for (auto share = items.take(); share.begin < share.end; share = items.take()) {
      const int64_t item = share.begin;
      // Head after head, so that its keys stay in the cache. The last tiles of a sequence come first: they see most
      // keys.
      const QueryTile tile = query_tile(p.cu_seqlens_q, p.sequences, p.tile_tokens(), tiles - 1 - item % tiles);
      if (tile.begin < tile.end) worker.attend_tile(tile, item / tiles);
    }
  });
  release_tiles();
}

}  // namespace

template <typename T>
void launch_attention_cpu(const AttentionProblem<T>& p, SharedWork& items) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (bf16_kernel() != nullptr) return attend_items<T, BFloat16>(p, bf16_kernel(), items);
  attend_items<T, float>(p, f32_kernel(), items);
}

template void launch_attention_cpu(const AttentionProblem<float>&, SharedWork&);
template void launch_attention_cpu(const AttentionProblem<BFloat16>&, SharedWork&);
template void launch_attention_cpu(const AttentionProblem<Half>&, SharedWork&);

}  // namespace mixtral
