// A tile of query rows walks over blocks of sixteen keys, converted to f32 once for the whole tile. Blocks start at
// multiples of sixteen of the absolute position, and a row takes part only in blocks that hold a key it sees: its sums
// run over the same blocks in the same order whatever its neighbours, the chunking or the layout of the keys.
#include <algorithm>
#include <limits>
#include <vector>

#include "../cpu/simd.h"
#include "sliding_window_attention.h"

namespace mixtral {
namespace {

using namespace cpu;

constexpr int64_t kKeyBlock = kLanes;

// The running softmax of one query row.
struct RowState {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;
};

MIXTRAL_INLINE void store_lanes(float* p, const Lanes& x) {
  for (int64_t j = 0; j < kLanes; ++j) p[j] = x.v[j];
}

// row [D] as f32, padded with zeros to a multiple of the lanes.
template <typename T>
MIXTRAL_INLINE void load_row(const T* row, int64_t head_dim, float* out) {
  const int64_t full = head_dim / kLanes * kLanes;
  for (int64_t d = 0; d < full; d += kLanes) store_lanes(out + d, load_lanes(row + d));
  if (full < head_dim) store_lanes(out + full, load_lanes(row + full, head_dim - full));
}

// Keys [from, to) of a block join the row. q, acc [width]; k_block, v_block [16, width]. Keys outside are not even
// multiplied by zero: they may hold NaN.
MIXTRAL_INLINE void update_row(RowState& state, const float* q, const float* k_block, const float* v_block, float* acc,
                               int64_t from, int64_t to, int64_t width, float scale) {
  Lanes scores;
  for (int64_t j = 0; j < kLanes; ++j) scores.v[j] = -std::numeric_limits<float>::infinity();
  float max = state.max;
  for (int64_t j = from; j < to; ++j) {
    Lanes dot{};
    for (int64_t d = 0; d < width; d += kLanes) fma_lanes(dot, load_lanes(q + d), load_lanes(k_block + j * width + d));
    const float score = sum_lanes(dot) * scale;
    scores.v[j] = score;
    max = score > max ? score : max;
  }
  Lanes weights;
  for (int64_t j = 0; j < kLanes; ++j) weights.v[j] = exp_f32(scores.v[j] - max);
  const float correction = exp_f32(state.max - max);
  state = {max, state.sum * correction + sum_lanes(weights)};
  for (int64_t d = 0; d < width; d += kLanes) {
    Lanes out = load_lanes(acc + d);
    for (int64_t i = 0; i < kLanes; ++i) out.v[i] *= correction;
    for (int64_t j = from; j < to; ++j) {
      const float weight = weights.v[j];
      const float* value = v_block + j * width + d;
      for (int64_t i = 0; i < kLanes; ++i) out.v[i] = __builtin_fmaf(weight, value[i], out.v[i]);
    }
    store_lanes(acc + d, out);
  }
}

// Memory of one thread, reused from tile to tile.
struct Scratch {
  std::vector<float> q, acc;            // [rows, width]
  std::vector<float> k_block, v_block;  // [16, width]
  std::vector<RowState> states;         // [rows]
};

// The query heads of `kv_head` for the tokens of `tile`; row r is token r / group, head r % group of the group.
template <typename T>
MIXTRAL_INLINE void attend_tile(const AttentionProblem<T>& p, const QueryTile& tile, int64_t kv_head, Scratch& s) {
  const int64_t width = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  const int64_t group = p.num_heads / p.num_kv_heads, rows = (tile.end - tile.begin) * group;
  const auto row_offset = [&](int64_t r) {
    return ((tile.begin + r / group) * p.num_heads + kv_head * group + r % group) * p.head_dim;
  };
  for (int64_t r = 0; r < rows; ++r) {
    load_row(p.q + row_offset(r), p.head_dim, &s.q[r * width]);
    s.states[r] = RowState{};
  }
  std::fill_n(s.acc.begin(), rows * width, 0.0f);

  // Ranges begin and end in order from token to token and leave no gap: every key in between is seen by some row.
  const int64_t first = p.visible(tile.sequence, tile.begin).begin, last = p.visible(tile.sequence, tile.end - 1).end;
  for (int64_t block = first / kKeyBlock * kKeyBlock; block < last; block += kKeyBlock) {
    for (int64_t j = std::max(first, block); j < std::min(last, block + kKeyBlock); ++j) {
      const int64_t offset = (p.keys.row(tile.sequence, j) * p.num_kv_heads + kv_head) * p.head_dim;
      load_row(p.k + offset, p.head_dim, &s.k_block[(j - block) * width]);
      load_row(p.v + offset, p.head_dim, &s.v_block[(j - block) * width]);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const KeyRange keys = p.visible(tile.sequence, tile.begin + r / group);
      const int64_t from = std::max(keys.begin, block) - block, to = std::min(keys.end - block, kKeyBlock);
      if (from < to)
        update_row(s.states[r], &s.q[r * width], s.k_block.data(), s.v_block.data(), &s.acc[r * width], from, to, width,
                   p.scale);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const float inverse = s.states[r].sum == 0.0f ? 0.0f : 1.0f / s.states[r].sum;  // 0: no key was seen
    T* out = p.out + row_offset(r);
    for (int64_t d = 0; d < p.head_dim; ++d) out[d] = from_float<T>(s.acc[r * width + d] * inverse);
  }
}

}  // namespace

template <typename T>
void launch_attention_cpu(const AttentionProblem<T>& p, int64_t begin, int64_t end) {
  for_cpu_isa([&] {
    const size_t width = (p.head_dim + kLanes - 1) / kLanes * kLanes;
    const size_t rows = kQueryTileCpu * p.num_heads / p.num_kv_heads;
    Scratch scratch;
    scratch.q.resize(rows * width);
    scratch.acc.resize(rows * width);
    scratch.k_block.resize(kKeyBlock * width);
    scratch.v_block.resize(kKeyBlock * width);
    scratch.states.resize(rows);
    for (int64_t item = begin; item < end; ++item) {
      const QueryTile tile = query_tile(p.cu_seqlens_q, p.sequences, kQueryTileCpu, item / p.num_kv_heads);
      if (tile.begin < tile.end) attend_tile(p, tile, item % p.num_kv_heads, scratch);
    }
  });
}

template void launch_attention_cpu(const AttentionProblem<float>&, int64_t, int64_t);
template void launch_attention_cpu(const AttentionProblem<BFloat16>&, int64_t, int64_t);
template void launch_attention_cpu(const AttentionProblem<Half>&, int64_t, int64_t);

}  // namespace mixtral
