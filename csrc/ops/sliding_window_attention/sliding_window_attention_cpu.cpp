// For a tile of query rows, one key block of 64 keys after the other: scores = Q K^T, online softmax, acc = correction
// * acc + weights V. The products are those of block_products.h. There a row's bits do not depend on the rows beside
// it.
//
// Key blocks start at multiples of 64 of the absolute position, and a row is computed only with key blocks that hold a
// key it sees. So its sums run over the same key blocks in the same order for any neighbours, chunks and layout of the
// keys. A key that a row does not see has the weight 0, which does not change the sums as long as its value is finite.
//
// Single query tokens over many keys are computed by decode_attention_cpu.cpp, to the same bits.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "../cpu/buffer.h"
#include "../cpu/shared_work.h"
#include "block_products.h"
#include "online_softmax.h"
#include "pack_keys.h"
#include "sliding_window_attention.h"

namespace mixtral {
namespace {

using namespace cpu;

// Memory that each thread keeps from call to call.
template <typename T, typename Stored, typename Operand>
struct Scratch {
  Buffer<Operand> q, weights;
  Buffer<Stored> panels, copies;
  Buffer<T> zeros;
  Buffer<float> scores, acc;
  Buffer<SoftmaxState> states;
};

// The keys from `start` on, those of them that query tokens [begin, end) of a tile see, counted from `start`, and their
// rows of keys and values; rows of zeros for all others, where there may be no memory.
template <typename T>
struct Block {
  int64_t start, begin, end;
  KeyRange seen;
  const T* rows[2 * kKeyBlock];  // 64 of keys, then 64 of values
};

// The work of one thread, tile after tile. Row r of a tile is query token r / group, head r % group of the group.
template <typename T, typename Stored, typename Operand>
class TileWorker {
 public:
  TileWorker(const AttentionProblem<T>& problem, BlockProducts<Stored, Operand> products,
             Scratch<T, Stored, Operand>& scratch)
      : problem_(problem),
        products_(products),
        group_(problem_.num_heads / problem_.num_kv_heads),
        width_(round_up(problem_.head_dim, kPanelColumns)),
        rows_(group_ * std::min(problem_.tile_tokens(), problem_.tokens)),
        q_(scratch.q.grow(rows_ * width_)),
        weights_(scratch.weights.grow(rows_ * kKeyBlock)),
        panels_(scratch.panels.grow(kKeyBlock * width_)),
        copies_(scratch.copies.grow(kKeyBlock * width_)),
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
    const int64_t first = visible(0).begin / kKeyBlock * kKeyBlock, last = visible(tokens - 1).end;
    Block<T> blocks[2], *block = blocks, *next = blocks + 1;
    if (first < last) find_block(first, *block);
    for (int64_t start = first; start < last; start += kKeyBlock, std::swap(block, next)) {
      const bool more = start + kKeyBlock < last;
      if (more) find_block(start + kKeyBlock, *next);
      const int64_t row_bytes = problem_.head_dim * sizeof(T);
      ahead_ = more ? RowsAhead(next->rows, 2 * kKeyBlock, row_bytes, row_bytes) : RowsAhead();
      attend_block(*block);
    }
    for (int64_t r = 0; r < tokens * group_; ++r) {
      const float sum = sum_lanes(states_[r].sum), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: no key was seen
      T* out = problem_.out + row_offset(r);
      for (int64_t d = 0; d < problem_.head_dim; ++d) out[d] = from_float<T>(acc_[r * width_ + d] * inverse);
      if (problem_.lse != nullptr)
        problem_.lse[lse_index(r)] = sum == 0.0f ? states_[r].max : states_[r].max + std::log(sum);
    }
  }

 private:
  int64_t row_offset(int64_t r) const {
    return ((tile_.begin + r / group_) * problem_.num_heads + kv_head_ * group_ + r % group_) * problem_.head_dim;
  }

  int64_t lse_index(int64_t r) const {
    return (kv_head_ * group_ + r % group_) * problem_.tokens + tile_.begin + r / group_;
  }

  KeyRange visible(int64_t token) const { return problem_.visible(tile_.sequence, tile_.begin + token); }

  // The keys of a block that `token` of the tile sees, counted from its start.
  KeyRange seen(int64_t start, int64_t token) const {
    const KeyRange keys = visible(token);
    return {std::clamp(keys.begin - start, int64_t{0}, kKeyBlock), std::clamp(keys.end - start, int64_t{0}, kKeyBlock)};
  }

  // The ranges of keys that tokens see begin and end in order and leave no gap: the tokens that see a key of the block
  // are neighbours, and every key between their first and their last one is seen.
  MIXTRAL_INLINE void find_block(int64_t start, Block<T>& block) const {
    block.start = start;
    block.begin = 0;
    block.end = tile_.end - tile_.begin;
    while (block.begin < block.end && seen(start, block.begin).begin >= seen(start, block.begin).end) ++block.begin;
    while (block.begin < block.end && seen(start, block.end - 1).begin >= seen(start, block.end - 1).end) --block.end;
    gather_rows({seen(start, block.begin).begin, seen(start, block.end - 1).end}, block);
  }

  MIXTRAL_INLINE void gather_rows(const KeyRange& keys, Block<T>& block) const {
    block.seen = keys;
    for (int64_t j = 0; j < kKeyBlock; ++j)
      if (j < keys.begin || j >= keys.end) block.rows[j] = block.rows[kKeyBlock + j] = zeros_;
    for (int64_t j = keys.begin; j < keys.end;) {
      const int64_t row = problem_.keys.row(tile_.sequence, block.start + j);
      int64_t offset = (row * problem_.num_kv_heads + kv_head_) * problem_.head_dim;
      const int64_t end = j + std::min(keys.end - j, problem_.keys.successive_keys(block.start + j));
      for (; j < end; ++j, offset += problem_.num_kv_heads * problem_.head_dim) {
        block.rows[j] = problem_.k + offset;
        block.rows[kKeyBlock + j] = problem_.v + offset;
      }
    }
  }

  MIXTRAL_INLINE void attend_block(Block<T>& block) {
    const KeyRange first = seen(block.start, block.begin), last = seen(block.start, block.end - 1);
    const bool alike = first.begin == last.begin && first.end == last.end;
    if (alike || values_are_finite(block)) {
      attend_rows(block);
      return;
    }
    // 0 * NaN is NaN: a token must not be multiplied with values that it does not see.
    for (const int64_t end = block.end; block.begin < end; ++block.begin) {
      block.end = block.begin + 1;
      gather_rows(seen(block.start, block.begin), block);
      attend_rows(block);
    }
  }

  MIXTRAL_INLINE bool values_are_finite(const Block<T>& block) const {
    for (int64_t j = block.seen.begin; j < block.seen.end; ++j)
      if (!is_finite(block.rows[kKeyBlock + j], problem_.head_dim)) return false;
    return true;
  }

  // The rows [begin, end) of a block as `Stored`, in copies of `width` values.
  MIXTRAL_INLINE void copy_rows(const T* const* rows, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      Stored* copy = copies_ + j * width_;
      convert_row(rows[j], rows[j] == zeros_ ? 0 : problem_.head_dim, width_, copy);
      copied_rows_[j] = copy;
    }
  }

  // These rows as `Stored`, of `width` values: where they lie, unless they have another type or width or copies are
  // asked for.
  MIXTRAL_INLINE const Stored* const* stored_rows(const T* const* rows, int64_t begin, int64_t end, bool copies) {
    if constexpr (std::is_same_v<T, Stored>)
      if (!copies && width_ == problem_.head_dim) return rows;
    copy_rows(rows, begin, end);
    return copied_rows_;
  }

  // Halves of the block that no row sees are skipped. Meanwhile the rows of the next block are fetched.
  MIXTRAL_INLINE void attend_rows(const Block<T>& block) {
    const int64_t begin = block.seen.begin / kPanelColumns * kPanelColumns,
                  end = round_up(block.seen.end, kPanelColumns);
    const int64_t row = block.begin * group_, rows = (block.end - block.begin) * group_;
    const Stored* const* keys = stored_rows(block.rows, begin, end, false);
    for (int64_t j = begin; j < end; j += kPanelColumns)
      pack_keys(keys + j, ahead_, width_, panels_ + (j - begin) * width_);
    products_.score(q_ + row * width_, rows, width_, panels_, ahead_, end - begin, scores_ + row * kKeyBlock + begin);
    for (int64_t r = row; r < row + rows; r += kSoftmaxRows) {
      const int64_t count = std::min(kSoftmaxRows, row + rows - r);
      const auto row_sees = [&](int64_t i) { return seen(block.start, (r + i) / group_); };
      softmax_block(scores_ + r * kKeyBlock, row_sees, count, problem_.scale, states_ + r, weights_ + r * kKeyBlock,
                    acc_ + r * width_, width_);
    }
    // Rows far from each other fall on the same few lines of the L1 cache: many rows of queries get copies.
    const Stored* const* values = stored_rows(block.rows + kKeyBlock, begin, end, rows > kRowsWithoutCopies);
    products_.add_values(weights_ + row * kKeyBlock + begin, rows, values + begin, ahead_, end - begin, width_,
                         acc_ + row * width_);
  }

  static constexpr int64_t kRowsWithoutCopies = 16;
  const AttentionProblem<T>& problem_;
  const BlockProducts<Stored, Operand> products_;
  const int64_t group_, width_, rows_;
  Operand* const q_;            // [rows, width]
  Operand* const weights_;      // [rows, 64]
  Stored* const panels_;        // [2][width/32][1024]
  Stored* const copies_;        // [64, width]
  const T* const zeros_;        // [width]
  float* const scores_;         // [rows, 64]
  float* const acc_;            // [rows, width]
  SoftmaxState* const states_;  // [rows]
  const Stored* copied_rows_[kKeyBlock];
  RowsAhead ahead_;
  QueryTile tile_{};
  int64_t kv_head_ = 0;
};

template <typename Stored, typename Operand, typename T>
void attend_items(const AttentionProblem<T>& p, SharedWork& items) {
  const int64_t tiles = num_query_tiles(p.tokens, p.sequences, p.tile_tokens());
  const auto products = block_products<Stored, Operand>();
  static thread_local Scratch<T, Stored, Operand> scratch;
  for_cpu_isa([&] {
    TileWorker<T, Stored, Operand> worker(p, products, scratch);
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
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bf16_kernel() != nullptr ? attend_items<BFloat16, BFloat16>(p, items)
                                    : attend_items<BFloat16, float>(p, items);
  } else {
    attend_items<float, float>(p, items);
  }
}

template void launch_attention_cpu(const AttentionProblem<float>&, SharedWork&);
template void launch_attention_cpu(const AttentionProblem<BFloat16>&, SharedWork&);
template void launch_attention_cpu(const AttentionProblem<Half>&, SharedWork&);

}  // namespace mixtral
