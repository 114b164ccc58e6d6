// Which key a query sees and where that key lies: index logic shared by the CPU and CUDA kernels of both attention ops.
// constexpr, so that one definition serves host and device (nvcc --expt-relaxed-constexpr).
#pragma once

#include <cstdint>
#include <limits>

namespace mixtral {

// Keys [begin, end) of a sequence.
struct KeyRange {
  int64_t begin, end;
};

// The keys that the query at `position` sees: the last `window` ones up to and including its own (window 0: all of
// them); without causality all `length` keys. A query before the first key (position < 0) sees none.
constexpr KeyRange visible_keys(int64_t position, int64_t length, int64_t window, bool causal) {
  if (!causal) return {0, length};
  if (position < 0) return {0, 0};
  const bool cut = window > 0 && position >= window;
  return {cut ? position - window + 1 : 0, position + 1};
}

// Query tokens [begin, end) of a sequence, counted from its first one.
struct QueryRange {
  int64_t begin, end;
};

// The queries, among the last `queries` positions of a sequence of `length` keys, that see a key of [keys.begin,
// keys.end): those between the first key and the end of the window of the last one.
constexpr QueryRange seeing_queries(const KeyRange& keys, int64_t queries, int64_t length, int64_t window,
                                    bool causal) {
  if (keys.begin >= keys.end) return {0, 0};
  if (!causal) return {0, queries};
  const int64_t first = length - queries;  // position of query 0
  const bool cut = window > 0 && window < length - keys.end + 1;
  const int64_t begin = keys.begin > first ? keys.begin : first, end = cut ? keys.end - 1 + window : length;
  return begin < end ? QueryRange{begin - first, end - first} : QueryRange{0, 0};
}

// Where the keys of a batch lie: sequence after sequence (packed, one page of all rows), or in pages (the rolling
// cache). On CUDA the numbers behind the pointers are unchecked.
struct KeyLayout {
  const int64_t* cu_seqlens = nullptr;  // packed: [B + 1]
  const int64_t* kv_lens = nullptr;     // paged: [B]
  const int64_t* page_table = nullptr;  // paged: [B, columns]
  int64_t pages = 0, page_size = 0, columns = 0;

  constexpr int64_t length(int64_t sequence) const {
    return page_table ? kv_lens[sequence] : cu_seqlens[sequence + 1] - cu_seqlens[sequence];
  }

  // Row of the key at `position` in the key tensor; -1 if there is no such row or page.
  constexpr int64_t row(int64_t sequence, int64_t position) const {
    if (!page_table) {
      const int64_t row = cu_seqlens[sequence] + position;
      return row < 0 || row >= page_size ? -1 : row;
    }
    const int64_t page = page_table[sequence * columns + position / page_size % columns];
    return page < 0 || page >= pages ? -1 : page * page_size + position % page_size;
  }

  // At least so many keys from `position` on lie in successive rows.
  constexpr int64_t successive_keys(int64_t position) const {
    return page_table ? page_size - position % page_size : std::numeric_limits<int64_t>::max();
  }
};

// Query rows [begin, end) of one sequence, worked on together; empty past the last tile of the sequence.
struct QueryTile {
  int64_t sequence, begin, end;
};

// Sequence b owns the tile numbers from cu_seqlens[b] / size + b on. These first numbers rise strictly, and the gap to
// the next one is never less than ceil(length / size): a grid sized from T and B alone covers every query, and a block
// finds its own tile by binary search.
constexpr int64_t num_query_tiles(int64_t tokens, int64_t sequences, int64_t size) { return tokens / size + sequences; }

constexpr QueryTile query_tile(const int64_t* cu_seqlens, int64_t sequences, int64_t size, int64_t tile) {
  int64_t low = 0, high = sequences;  // first number of `low` <= tile < first number of `high`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu_seqlens[middle] / size + middle <= tile ? low : high) = middle;
  }
  const int64_t limit = cu_seqlens[low + 1];
  const int64_t begin = cu_seqlens[low] + (tile - cu_seqlens[low] / size - low) * size;
  if (begin >= limit) return {low, limit, limit};
  return {low, begin, begin + size < limit ? begin + size : limit};
}

}  // namespace mixtral
