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

// Where the box of the keys from `position` on lies in a map of [pages, page_size] rows. A row that does not exist
// is outside the map: TMA brings zeros.
struct KeyBox {
  int row, page;
};

constexpr KeyBox key_box(const KeyLayout& keys, int64_t sequence, int64_t position) {
  const int64_t row = keys.row(sequence, position);
  if (row < 0) return {0, static_cast<int>(keys.pages)};
  return {static_cast<int>(row % keys.page_size), static_cast<int>(row / keys.page_size)};
}

}  // namespace mixtral
