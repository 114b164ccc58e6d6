// The paged rolling key/value cache: a pool of fixed pages, and per sequence a ring of page-table columns.
//
// Position p of a sequence lives in page page_table[(p div P) mod R], row p mod P. With a window W a page that lies
// wholly behind the window of every query to come goes back to the pool, so a sequence holds at most R = ceil((W - 1 +
// chunk) / P) + 1 pages however long it grows (Jiang et al., "Mistral 7B", 2023, section 2, rolling buffer cache; here
// it rolls page by page, so no page is ever overwritten in place). Without a window R grows.
//
// A prefix cache: a sequence whose tokens are committed names its full pages by them, and one that begins alike shares
// them. With a window, the pages that the next token sees are all that must still be there.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "batch.h"
#include "config.h"
#include "defaults.h"
#include "libtorch.h"
#include "page_pool.h"

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

  // config: of the layers and heads that it holds, MixtralImpl::cache_config(). Throws OutOfMemory when the pages do
  // not fit the device, std::runtime_error when an option is out of range.
  RollingKVCache(const Config& config, Options options);

  // Pages one sequence of `length` tokens holds at most.
  static int64_t pages_needed(const Config& config, int64_t page_size, int64_t max_chunk, int64_t length);
  // Bytes of one page, keys and values of all layers.
  static int64_t page_bytes(const Config& config, int64_t page_size, torch::ScalarType dtype);

  const Options& options() const { return options_; }
  int64_t num_pages() const { return options_.num_pages; }
  int64_t page_size() const { return options_.page_size; }
  int64_t pages_needed(int64_t length) const;

  int64_t add_sequence();
  // A sequence that may share pages: it begins with the longest prefix of `ids`, of at most `most` tokens, whose keys
  // and values are cached; length() tells how many these are. kind: what keys and values depend on besides the tokens.
  int64_t add_sequence(const std::vector<int64_t>& ids, int64_t most, int64_t kind);
  // Its pages go back to the pool; committed full ones stay cached until they are taken.
  void remove_sequence(int64_t sequence);
  // The same when the keys may be NaN: no later sequence begins with these pages, and they become zero.
  void discard_sequence(int64_t sequence);

  // Takes the pages for the next `tokens` tokens. Returns false and changes nothing when the pool has too few.
  bool reserve(int64_t sequence, int64_t tokens);
  // The first length(sequence) ids are the sequence's tokens, their keys and values are computed, and truncate() will
  // not forget them. Names the pages that they fill, and gives back those behind the window.
  void commit(int64_t sequence, const std::vector<int64_t>& ids);
  // Forgets the tokens of a sequence from `length` on. Returns false and changes nothing when keys that the next query
  // would see are no longer held: they were behind the window. Committed tokens that fill a page cannot be forgotten.
  bool truncate(int64_t sequence, int64_t length);

  // The same cache on the other ranks of a model is storage alone. It lives as long as this object does, and the pages
  // that became zero here since the last call of take_zeroed() become zero there.
  std::shared_ptr<const void> lifetime() const { return lifetime_; }
  std::vector<int64_t> take_zeroed();
  void zero(const std::vector<int64_t>& pages);

  // Keys and values outside the cache, on the CPU.
  struct Contents {
    int64_t length = 0;                       // tokens
    std::vector<torch::Tensor> keys, values;  // per layer [pages,P,Nkv,D]: the last pages up to `length`
  };
  Contents contents(int64_t sequence) const;
  // Caches the full pages of `contents`, whose tokens are `ids`. Throws OutOfMemory and changes nothing when the pool
  // has too few pages that nobody uses, std::runtime_error when the contents have more or fewer than `length` needs.
  void load(const Contents& contents, const std::vector<int64_t>& ids, int64_t kind);

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
  int64_t pages_held(int64_t sequence) const;
  int64_t pages_available() const { return pool_.available(); }
  int64_t pages_in_use() const { return num_pages() - pages_available(); }
  int64_t pages_cached() const { return pool_.cached(); }  // in use by nobody, but named
  // Throws std::logic_error unless every page and name is accounted for.
  void check_integrity() const;

 private:
  struct Sequence {
    int64_t length = 0;
    int64_t first = 0;                   // p div P of the first page it holds
    std::deque<int32_t> pages;           // one for each p div P from `first` on
    PagePool::Prefix* prefix = nullptr;  // its tokens up to the last page that was committed full; null: shares none
    int64_t committed = 0;               // pages of `prefix`
  };
  // The pages [first, end), as p div P, that the `tokens` tokens behind `length` see or write.
  struct PageRange {
    int64_t first, end;
  };
  PageRange visible_pages(int64_t length, int64_t tokens) const;
  Sequence& find(int64_t sequence);
  int64_t pages_to_take(const Sequence& sequence, int64_t tokens) const;
  void check(const std::vector<Chunk>& chunks) const;
  void release_pages(Sequence& sequence);
  void take_pages(Sequence& sequence, int64_t tokens);

  Config config_;
  Options options_;
  std::vector<torch::Tensor> keys_, values_;  // per layer
  PagePool pool_;
  std::map<int64_t, Sequence> sequences_;
  int64_t next_sequence_ = 0;
  std::set<int64_t> zeroed_;
  std::shared_ptr<const char> lifetime_ = std::make_shared<char>();
};

}  // namespace mixtral
