// The paged rolling key/value cache: a pool of fixed pages, and per sequence a ring of page-table columns.
//
// Position p of a sequence lives in page page_table[(p div P) mod R], row p mod P. With a window W a page that lies
// wholly behind the window of every query to come goes back to the pool, so a sequence holds at most R = ceil((W - 1 +
// chunk) / P) + 1 pages however long it grows (Jiang et al., "Mistral 7B", 2023, section 2, rolling buffer cache; here
// it rolls page by page, so no page is ever overwritten in place). Without a window R grows.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "batch.h"
#include "config.h"
#include "defaults.h"
#include "libtorch.h"

namespace mixtral {

class RollingKVCache {
 public:
  struct Options {
    int64_t page_size = kPageSize;
    int64_t num_pages = 0;
    int64_t max_chunk = kChunkSize;  // most tokens of one sequence in one batch
    torch::Device device = torch::kCPU;
    torch::ScalarType dtype = torch::kFloat32;
    int64_t padding_tokens = 0;  // most tokens that pad a batch (HostBatch::pad)
  };
  // A chunk of one sequence: the next tokens after those it already holds.
  struct Chunk {
    int64_t sequence;
    std::vector<int64_t> input_ids;
  };

  // Throws OutOfMemory when the pages do not fit the device, std::runtime_error when an option is out of range.
  RollingKVCache(const Config& config, Options options);

  // Pages one sequence of `length` tokens holds at most.
  static int64_t pages_needed(const Config& config, int64_t page_size, int64_t max_chunk, int64_t length);
  // Bytes of one page, keys and values of all layers.
  static int64_t page_bytes(const Config& config, int64_t page_size, torch::ScalarType dtype);

  // Makes the pool larger. Pages keep their numbers and contents, but move in memory. Layers grow one after the other,
  // so the copy needs room for one old layer beside the new pool. When it throws (OutOfMemory), the cache works on with
  // the pages it had.
  void grow(int64_t num_pages);
  int64_t num_pages() const { return options_.num_pages; }
  // Bytes that grow(num_pages) allocates beyond the present pool.
  double bytes_to_grow(int64_t num_pages) const;

  int64_t add_sequence();
  void remove_sequence(int64_t sequence);  // its pages go back to the pool
  // Its keys and values become 0. For those that may be NaN, before others get the pages.
  void clear_sequence(int64_t sequence);
  // What a sequence holds, to be kept outside the cache: its pages, on the CPU.
  struct Contents {
    int64_t length = 0;                       // tokens
    std::vector<torch::Tensor> keys, values;  // per layer [pages,P,Nkv,D]: the last pages up to `length`
  };
  Contents contents(int64_t sequence) const;
  // A new sequence with these contents. Throws std::runtime_error and changes nothing when the pool has too few pages
  // or the contents have more or fewer than `length` tokens need.
  int64_t add_sequence(const Contents& contents);
  // Forgets the tokens of a sequence from `length` on. Returns false and changes nothing when keys that the next query
  // would see are no longer held: they were behind the window.
  bool truncate(int64_t sequence, int64_t length);

  // Takes pages for the chunks, gives back pages behind the window, and lays out the batch. Throws std::runtime_error
  // and changes nothing when the pool has too few pages, a chunk is empty or longer than max_chunk, or a sequence is
  // unknown or named twice. After it the tokens count as held, so the forward pass must follow.
  HostBatch lay_out(const std::vector<Chunk>& chunks);
  // lay_out(), moved to the device.
  Batch prepare(const std::vector<Chunk>& chunks);
  // The first slot behind the pool. No sequence uses the slots from there on: they take the keys of padding.
  int64_t padding_slot() const { return options_.num_pages * options_.page_size; }

  // The pages of the pool, and behind them those for padding.
  torch::Tensor keys(int64_t layer) const;    // [pages,P,Nkv,D]
  torch::Tensor values(int64_t layer) const;  // [pages,P,Nkv,D]
  int64_t length(int64_t sequence) const;
  int64_t pages_in_use() const;
  int64_t pages_held(int64_t sequence) const;
  bool empty() const { return sequences_.empty(); }

 private:
  struct Sequence {
    int64_t length = 0;
    int64_t first = 0;          // p div P of the first page it holds
    std::deque<int32_t> pages;  // one for each p div P from `first` on
  };
  // The pages [first, end), as p div P, that the `tokens` tokens behind `length` see or write.
  struct PageRange {
    int64_t first, end;
  };
  PageRange visible_pages(int64_t length, int64_t tokens) const;
  Sequence& find(int64_t sequence);
  torch::Tensor new_pool(int64_t num_pages) const;
  void check(const std::vector<Chunk>& chunks) const;
  void release_pages(Sequence& sequence);
  void take_pages(Sequence& sequence, int64_t tokens);

  Config config_;
  Options options_;
  std::vector<torch::Tensor> keys_, values_;  // per layer
  std::vector<int32_t> free_pages_;
  std::map<int64_t, Sequence> sequences_;
  int64_t next_sequence_ = 0;
};

}  // namespace mixtral
