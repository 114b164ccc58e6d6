#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "../cpu/buffer.h"
#include "../cpu/shared_work.h"
#include "block_products.h"
#include "decode_attention.h"
#include "online_softmax.h"
#include "pack_keys.h"

namespace mixtral {
namespace {

using namespace cpu;

// Some keys of a sequence that lie in one key block.
struct KeyBlock {
  int64_t sequence, start;
  KeyRange seen;  // counted from `start`
};

// The blocks with keys that the query of `sequence` sees.
template <typename T>
void append_blocks(const AttentionProblem<T>& p, int64_t sequence, std::vector<KeyBlock>& blocks) {
  const int64_t token = p.cu_seqlens_q[sequence];
  if (p.cu_seqlens_q[sequence + 1] == token) return;
  const KeyRange keys = p.visible(sequence, token);
  for (int64_t start = keys.begin / kKeyBlock * kKeyBlock; start < keys.end; start += kKeyBlock)
    blocks.push_back(
        {sequence, start, {std::max<int64_t>(keys.begin - start, 0), std::min(keys.end - start, kKeyBlock)}});
}

template <typename T, typename Stored, typename Operand>
class Decoder {
 public:
  Decoder(const AttentionProblem<T>& problem, int64_t threads, const ParallelFor& parallel_for)
      : p_(problem),
        parallel_for_(parallel_for),
        threads_(threads),
        products_(block_products<Stored, Operand>()),
        group_(p_.num_heads / p_.num_kv_heads),
        width_(round_up(p_.head_dim, kPanelColumns)),
        q_(p_.tokens * p_.num_heads * width_),
        zeros_(width_),
        states_(p_.tokens * p_.num_heads),
        acc_(p_.tokens * p_.num_heads * width_) {
    for (int64_t r = 0; r < p_.tokens * p_.num_heads; ++r)
      convert_row(p_.q + r * p_.head_dim, p_.head_dim, width_, q_.at(r * width_));
    for (int64_t b = 0; b < p_.sequences; ++b) append_blocks(p_, b, blocks_);
  }

  void run() {
    // What a step writes and reads again fits in the L2 caches of the threads, and there is work for all of them.
    const int64_t bytes = p_.num_heads * (kKeyBlock + width_) * static_cast<int64_t>(sizeof(float));
    const int64_t step = std::max(threads_ * kStepBytes / bytes, 4 * threads_);
    const int64_t most = std::min<int64_t>(step, blocks_.size());
    scores_.grow(most * p_.num_heads * kKeyBlock);
    partial_.grow(most * p_.num_heads * width_);
    max_.resize(most * p_.num_heads);
    correction_.resize(most * p_.num_heads);
    sums_.resize(most * p_.num_heads);
    const int64_t total = blocks_.size();
    for (begin_ = 0; begin_ < total; begin_ += step) {
      count_ = std::min(step, total - begin_);
      share(count_, [this](int64_t begin, int64_t end) { score(begin, end); });
      running_maxima();
      share(count_, [this](int64_t begin, int64_t end) { add_values(begin, end); });
      share(p_.num_heads, [this](int64_t begin, int64_t end) { fold(begin, end); });
    }
    finish();
  }

 private:
  static constexpr int64_t kStepBytes = 512 << 10;  // for each thread

  // Shares out [0, count): threads find different time, and a run of blocks is read in order.
  template <typename F>
  void share(int64_t count, const F& body) {
    SharedWork work(count, threads_, 1);
    parallel_for_(threads_, [&](int64_t, int64_t) {
      for_cpu_isa([&] {
        for (auto run = work.take(); run.begin < run.end; run = work.take()) body(run.begin, run.end);
      });
    });
  }

  const KeyBlock& block(int64_t i) const { return blocks_[begin_ + i]; }

  // Row of scores and the like for block i of the step.
  int64_t row(int64_t i, int64_t head) const { return i * p_.num_heads + head; }

  // Row of q, acc and out.
  int64_t query(const KeyBlock& block, int64_t head) const {
    return p_.cu_seqlens_q[block.sequence] * p_.num_heads + head;
  }

  // The rows of k or v that hold the keys or values of a block, for all heads; null for keys that are not seen.
  using Rows = std::array<const T*, kKeyBlock>;

  MIXTRAL_INLINE void find_rows(const KeyBlock& block, const T* from, Rows& rows) const {
    rows.fill(nullptr);
    const int64_t row_size = p_.num_kv_heads * p_.head_dim;
    for (int64_t j = block.seen.begin; j < block.seen.end;) {
      const T* row = from + p_.keys.row(block.sequence, block.start + j) * row_size;
      const int64_t end = j + std::min(block.seen.end - j, p_.keys.successive_keys(block.start + j));
      for (; j < end; ++j, row += row_size) rows[j] = row;
    }
  }

  // The part of one key/value head, as `Stored`, of `width` values: where it lies, unless it has another type or width.
  // Rows of zeros for keys that are not seen.
  struct HeadRows {
    const Stored* rows[kKeyBlock];
    Buffer<Stored> copies;
  };

  MIXTRAL_INLINE const Stored* const* of_head(const Rows& rows, int64_t kv_head, HeadRows& of_head) const {
    if (!std::is_same_v<T, Stored> || width_ != p_.head_dim) of_head.copies.grow(kKeyBlock * width_);
    for (int64_t j = 0; j < kKeyBlock; ++j) {
      const T* row = rows[j] != nullptr ? rows[j] + kv_head * p_.head_dim : zeros_.data();
      if constexpr (std::is_same_v<T, Stored>) {
        if (width_ == p_.head_dim) {
          of_head.rows[j] = row;
          continue;
        }
      }
      Stored* copy = of_head.copies.at(j * width_);
      convert_row(row, p_.head_dim, width_, copy);
      of_head.rows[j] = copy;
    }
    return of_head.rows;
  }

  // Calls body(i, rows, ahead) for blocks [begin, end). By `ahead` it fetches the rows of the block after it.
  template <typename F>
  MIXTRAL_INLINE void for_blocks(int64_t begin, int64_t end, const T* from, const F& body) const {
    Rows buffers[2];
    find_rows(block(begin), from, buffers[0]);
    for (int64_t i = begin; i < end; ++i) {
      Rows &rows = buffers[(i - begin) % 2], &next = buffers[(i - begin + 1) % 2];
      RowsAhead ahead;
      if (i + 1 < end) {
        const KeyBlock& b = block(i + 1);
        find_rows(b, from, next);
        const int64_t bytes = p_.head_dim * static_cast<int64_t>(sizeof(T));
        ahead = RowsAhead(&next[b.seen.begin], b.seen.end - b.seen.begin, p_.num_kv_heads * bytes, bytes);
      }
      body(i, rows, ahead);
    }
  }

  MIXTRAL_INLINE void score(int64_t begin, int64_t end) {
    static thread_local HeadRows kept_rows;
    static thread_local Buffer<Stored> kept_panels;
    HeadRows& head_rows = kept_rows;  // found once: looking for a thread's own object takes time
    Buffer<Stored>& panels = kept_panels;
    panels.grow(kKeyBlock * width_);
    for_blocks(begin, end, p_.k, [&](int64_t i, const Rows& rows, RowsAhead& ahead) {
      const KeyBlock& b = block(i);
      const int64_t first = b.seen.begin / kPanelColumns * kPanelColumns, last = round_up(b.seen.end, kPanelColumns);
      for (int64_t h = 0; h < p_.num_kv_heads; ++h) {
        const Stored* const* keys = of_head(rows, h, head_rows);
        for (int64_t j = first; j < last; j += kPanelColumns)
          pack_keys(keys + j, ahead, width_, panels.at((j - first) * width_));
        products_.score(q_.at(query(b, h * group_) * width_), group_, width_, panels.at(0), ahead, last - first,
                        scores_.at(row(i, h * group_) * kKeyBlock) + first);
      }
      for (int64_t h = 0; h < p_.num_heads; h += kSoftmaxRows) {
        const int64_t r = row(i, h), count = std::min(kSoftmaxRows, p_.num_heads - h);
        scale_scores(
            scores_.at(r * kKeyBlock), [&](int64_t) { return b.seen; }, count, p_.scale, &max_[r]);
      }
    });
  }

  void running_maxima() {
    for_cpu_isa([&] {
      for (int64_t i = 0; i < count_; ++i)
        raise_maxima(&max_[row(i, 0)], p_.num_heads, &states_[query(block(i), 0)], &correction_[row(i, 0)]);
    });
  }

  MIXTRAL_INLINE void add_values(int64_t begin, int64_t end) {
    static thread_local HeadRows kept_rows;
    static thread_local Buffer<Operand> kept_weights;
    HeadRows& head_rows = kept_rows;
    Buffer<Operand>& weights = kept_weights;
    weights.grow(p_.num_heads * kKeyBlock);
    for_blocks(begin, end, p_.v, [&](int64_t i, const Rows& rows, RowsAhead& ahead) {
      const KeyBlock& b = block(i);
      const int64_t first = b.seen.begin / kPanelColumns * kPanelColumns, last = round_up(b.seen.end, kPanelColumns);
      for (int64_t h = 0; h < p_.num_heads; h += kSoftmaxRows) {
        const int64_t r = row(i, h), count = std::min(kSoftmaxRows, p_.num_heads - h);
        weigh_scores(scores_.at(r * kKeyBlock), &max_[r], count, weights.at(h * kKeyBlock), &sums_[r]);
      }
      for (int64_t h = 0; h < p_.num_kv_heads; ++h) {
        const Stored* const* values = of_head(rows, h, head_rows);
        float* partial = partial_.at(row(i, h * group_) * width_);
        std::fill_n(partial, group_ * width_, -0.0f);  // -0 + x is x, for 0 too
        products_.add_values(weights.at(h * group_ * kKeyBlock) + first, group_, values + first, ahead, last - first,
                             width_, partial);
      }
    });
  }

  MIXTRAL_INLINE void fold(int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t h = begin; h < end; ++h) {
        const int64_t r = row(i, h), q = query(block(i), h);
        float* acc = acc_.at(q * width_);
        correct(correction_[r], states_[q], acc, width_);
        add_sum(states_[q], sums_[r]);
        const float* partial = partial_.at(r * width_);
        for (int64_t d = 0; d < width_; ++d) acc[d] += partial[d];
      }
  }

  void finish() {
    for (int64_t r = 0; r < p_.tokens * p_.num_heads; ++r) {
      const float sum = sum_lanes(states_[r].sum), inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: no key was seen
      for (int64_t d = 0; d < p_.head_dim; ++d)
        p_.out[r * p_.head_dim + d] = from_float<T>(*acc_.at(r * width_ + d) * inverse);
    }
  }

  const AttentionProblem<T>& p_;
  const ParallelFor& parallel_for_;
  const int64_t threads_;
  const BlockProducts<Stored, Operand> products_;
  const int64_t group_, width_;
  Buffer<Operand> q_;                 // [tokens, Nq, width]
  const std::vector<T> zeros_;        // [width]
  std::vector<SoftmaxState> states_;  // [tokens, Nq]
  Buffer<float> acc_;                 // [tokens, Nq, width]
  std::vector<KeyBlock> blocks_;
  int64_t begin_ = 0, count_ = 0;        // blocks of the step
  Buffer<float> scores_, partial_;       // [count, Nq, 64], [count, Nq, width]
  std::vector<float> max_, correction_;  // [count, Nq]
  std::vector<Lanes> sums_;              // [count, Nq]
};

}  // namespace

template <typename T>
bool takes_decode_attention_cpu(const AttentionProblem<T>& p) {
  constexpr int64_t kLeastKeys = 1024;  // for each token
  if (p.tokens == 0 || p.tokens > p.sequences || p.lse != nullptr || cpu_isa() == CpuIsa::kAmx) return false;
  int64_t keys = 0;
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t token = p.cu_seqlens_q[b], queries = p.cu_seqlens_q[b + 1] - token;
    if (queries > 1) return false;
    if (queries == 1) keys += p.visible(b, token).end - p.visible(b, token).begin;
  }
  return keys >= kLeastKeys * p.tokens;
}

template <typename T>
void decode_attention_cpu(const AttentionProblem<T>& p, int64_t threads, const ParallelFor& parallel_for) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (bf16_kernel() != nullptr) return Decoder<T, BFloat16, BFloat16>(p, threads, parallel_for).run();
    return Decoder<T, BFloat16, float>(p, threads, parallel_for).run();
  } else {
    return Decoder<T, float, float>(p, threads, parallel_for).run();
  }
}

#define MIXTRAL_INSTANTIATE(T)                                          \
  template bool takes_decode_attention_cpu(const AttentionProblem<T>&); \
  template void decode_attention_cpu(const AttentionProblem<T>&, int64_t, const ParallelFor&);
MIXTRAL_INSTANTIATE(float)
MIXTRAL_INSTANTIATE(BFloat16)
MIXTRAL_INSTANTIATE(Half)
#undef MIXTRAL_INSTANTIATE

}  // namespace mixtral
