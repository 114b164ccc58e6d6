// How attention_prefill_hopper.cuh cuts its work: tiles of 128 query rows against blocks of 128 keys. Index logic only,
// constexpr for host and device.
#pragma once

#include "../../host_device.h"
#include "../attention_index.h"

namespace mixtral {

inline constexpr int kTileRows = 128, kBlockKeys = 128;

// The rows of a tile are tokens times the query heads of one key/value head (row = token * group + head), so that few
// tokens fill a tile too and all heads share its keys. Rows from tile_tokens * group on do not exist.
constexpr int64_t tile_tokens(int64_t group) { return kTileRows / group; }

// The keys of a tile, relative to `origin`, the absolute start of its first block. Blocks start at multiples of 128 in
// absolute positions, so the order of a row's sums depends on the row alone.
struct PrefillKeys {
  int64_t origin;
  int blocks;
  int begin, end;          // [begin, end): some row sees the key
  int all_begin, all_end;  // [all_begin, all_end): every row does; may be empty

  // Some row does not see some key of the block.
  constexpr bool partial(int block) const {
    return block * kBlockKeys < all_begin || (block + 1) * kBlockKeys > all_end;
  }
};

// From the keys that the first and the last row see: neither end of visible_keys() falls from token to token.
constexpr PrefillKeys prefill_keys(KeyRange first, KeyRange last) {
  const int64_t origin = first.begin / kBlockKeys * kBlockKeys;
  const int64_t count = last.end > first.begin ? last.end - origin : 0;
  return {origin,
          static_cast<int>(ceil_div(count, kBlockKeys)),
          static_cast<int>(first.begin - origin),
          static_cast<int>(count),
          static_cast<int>(last.begin - origin),
          static_cast<int>(first.end - origin)};
}

// Keys in one TMA box: successive positions within a page.
constexpr int64_t box_keys(const KeyLayout& keys) {
  return keys.page_table && keys.page_size < kBlockKeys ? keys.page_size : kBlockKeys;
}

// What the kernel would need divisions for. Tiles and heads are counted in 32 bits (takes_attention_prefill_hopper).
struct PrefillPlan {
  int group, tile_tokens;                // query heads of a key/value head; query tokens of a tile
  int row_tokens;                        // row * row_tokens >> 16 is row / group
  int tiles, items;                      // tiles of query tokens, some empty; times key/value heads
  int block_rows, block_columns;         // from a box to that of the next block: rows in the page, columns of the table
  double inverse_page, inverse_columns;  // of the rows of a page, of the columns

  constexpr int row_token(int row) const { return row * row_tokens >> 16; }
};

constexpr PrefillPlan prefill_plan(int64_t tokens, int64_t sequences, int64_t group, int64_t num_kv_heads,
                                   const KeyLayout& keys) {
  const int64_t size = tile_tokens(group), tiles = num_query_tiles(tokens, sequences, size);
  const bool small_pages = keys.page_size < kBlockKeys;
  const int64_t columns = keys.page_table ? keys.columns : 1;
  return {static_cast<int>(group),
          static_cast<int>(size),
          static_cast<int>(ceil_div(1 << 16, group)),
          static_cast<int>(tiles),
          static_cast<int>(tiles * num_kv_heads),
          small_pages ? 0 : kBlockKeys,
          small_pages ? static_cast<int>(kBlockKeys / keys.page_size % columns) : 0,
          1.0 / static_cast<double>(keys.page_size),
          1.0 / static_cast<double>(columns)};
}

// x = quotient * divisor + remainder, 0 <= x < 2^53.
struct Quotient {
  int64_t quotient;
  int remainder;
};
constexpr Quotient divide_by(int64_t x, int divisor, double inverse) {
  int64_t quotient = static_cast<int64_t>(static_cast<double>(x) * inverse);  // one too many or too few at most
  int64_t remainder = x - quotient * divisor;
  if (remainder < 0) return {quotient - 1, static_cast<int>(remainder + divisor)};
  if (remainder >= divisor) return {quotient + 1, static_cast<int>(remainder - divisor)};
  return {quotient, static_cast<int>(remainder)};
}

// The tile of query tokens of number `tile`: query_tile() in 32 bits. Starts outside [0, tokens] become tokens + 1, so
// that no tile up to them is one of q.
constexpr QueryTile prefill_query_tile(const int64_t* cu_seqlens, int64_t sequences, int64_t tokens, unsigned size,
                                       int tile) {
  const auto start = [&](int sequence) {
    const int64_t x = cu_seqlens[sequence];
    return static_cast<int>(x < 0 || x > tokens ? tokens + 1 : x);
  };
  const auto first_tile = [&](int sequence, int x) {
    return static_cast<int>(static_cast<unsigned>(x) / size) + sequence;
  };
  int low = 0, high = static_cast<int>(sequences);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_tile(middle, start(middle)) <= tile ? low : high) = middle;
  }
  const int first = start(low), limit = start(low + 1), step = static_cast<int>(size);
  const int64_t begin = first + static_cast<int64_t>(tile - first_tile(low, first)) * step;
  if (begin >= limit) return {low, limit, limit};
  return {low, begin, begin + step < limit ? begin + step : limit};
}

// Where a box of keys lies in a map of [pages, page_size] rows. A box that does not exist is outside the map: TMA
// brings zeros.
struct KeyBox {
  int row, page;
};

// The boxes of successive blocks of keys, without a division but for the first one.
class KeyBoxes {
 public:
  // The first box starts at `position`.
  constexpr KeyBoxes(const KeyLayout& keys, const PrefillPlan& plan, int64_t sequence, int64_t position)
      : keys_(keys), plan_(plan), packed_row_(0), page_table_(nullptr), row_(0), column_(0) {
    if (!keys.page_table) {
      packed_row_ = keys.cu_seqlens[sequence] + position;
      return;
    }
    page_table_ = keys.page_table + sequence * keys.columns;
    const Quotient page = divide_by(position, static_cast<int>(keys.page_size), plan.inverse_page);
    row_ = page.remainder;
    column_ = divide_by(page.quotient, static_cast<int>(keys.columns), plan.inverse_columns).remainder;
  }

  constexpr KeyBox next() {
    if (!page_table_) {
      const int64_t row = packed_row_;
      packed_row_ += kBlockKeys;
      return row < 0 || row >= keys_.page_size ? KeyBox{0, 1} : KeyBox{static_cast<int>(row), 0};
    }
    const int64_t page = page_table_[column_];
    const KeyBox box = page < 0 || page >= keys_.pages ? KeyBox{0, static_cast<int>(keys_.pages)}
                                                       : KeyBox{row_, static_cast<int>(page)};
    row_ += plan_.block_rows;
    column_ += plan_.block_columns;
    if (row_ >= keys_.page_size) {
      row_ = 0;
      ++column_;
    }
    if (column_ >= keys_.columns) column_ -= static_cast<int>(keys_.columns);
    return box;
  }

 private:
  const KeyLayout& keys_;
  const PrefillPlan& plan_;
  int64_t packed_row_;
  const int64_t* page_table_;  // of the sequence
  int row_, column_;
};

}  // namespace mixtral
