#include "rolling_kv_cache.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "../ops/host_device.h"
#include "memory.h"

namespace mixtral {
namespace {

constexpr const char* kName = "the key/value cache";  // in errors

void require_cache(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("RollingKVCache: " + message);
}

int64_t rows_of(const RollingKVCache::Options& options) {
  return options.num_pages + ceil_div(options.padding_tokens, options.page_size);
}

const RollingKVCache::Options& checked(const Config& config, const RollingKVCache::Options& options) {
  require_cache(options.page_size > 0, "page_size must be > 0, got " + std::to_string(options.page_size));
  require_cache(options.max_chunk > 0, "max_chunk must be > 0, got " + std::to_string(options.max_chunk));
  require_cache(options.num_pages > 0 && options.num_pages <= INT32_MAX,
                "num_pages must be in [1, 2^31), got " + std::to_string(options.num_pages));
  require_cache(options.padding_tokens >= 0,
                "padding_tokens must be >= 0, got " + std::to_string(options.padding_tokens));
  const int64_t bytes = RollingKVCache::page_bytes(config, options.page_size, options.dtype);
  check_memory(kName, static_cast<double>(rows_of(options)) * static_cast<double>(bytes), options.device.str());
  return options;
}

}  // namespace

RollingKVCache::RollingKVCache(const Config& config, Options options)
    : config_(config), options_(checked(config, options)), pool_(options.num_pages, options.page_size) {
  for (int64_t layer = 0; layer < config.num_layers; ++layer)
    for (auto* pool : {&keys_, &values_})
      pool->push_back(torch::empty({rows_of(options), options.page_size, config.num_kv_heads, config.head_dim},
                                   torch::dtype(options.dtype).device(options.device)));
}

int64_t RollingKVCache::page_bytes(const Config& config, int64_t page_size, torch::ScalarType dtype) {
  return page_size * config.kv_bytes_per_token(static_cast<int64_t>(c10::elementSize(dtype)));
}

int64_t RollingKVCache::pages_needed(const Config& config, int64_t page_size, int64_t max_chunk, int64_t length) {
  const int64_t all = ceil_div(length, page_size);
  if (config.window == 0) return all;
  return std::min(all, ceil_div(config.window - 1 + max_chunk, page_size) + 1);
}

int64_t RollingKVCache::pages_needed(int64_t length) const {
  return pages_needed(config_, options_.page_size, std::min(options_.max_chunk, length), length);
}

// ---- sequences

int64_t RollingKVCache::add_sequence() {
  sequences_.emplace(next_sequence_, Sequence{});
  return next_sequence_++;
}

int64_t RollingKVCache::add_sequence(const std::vector<int64_t>& ids, int64_t most, int64_t kind) {
  Sequence& sequence = sequences_[next_sequence_];
  std::vector<PagePool::Prefix*> prefixes = {pool_.begin(kind)};
  sequence.prefix = prefixes[0];
  // The last prefix whose visible pages are cached: `run` of them end with it.
  int64_t run = 0;
  for (int64_t pages = 1; pages <= most / options_.page_size; ++pages) {
    PagePool::Prefix* const longer = pool_.find(prefixes.back(), ids.data() + (pages - 1) * options_.page_size);
    if (!longer) break;
    prefixes.push_back(longer);
    run = longer->page >= 0 ? run + 1 : 0;
    if (run >= pages - visible_pages(pages * options_.page_size, 0).first) sequence.committed = pages;
  }
  sequence.length = sequence.committed * options_.page_size;
  sequence.first = visible_pages(sequence.length, 0).first;
  for (int64_t page = sequence.first; page < sequence.committed; ++page) {
    sequence.pages.push_back(prefixes[static_cast<size_t>(page) + 1]->page);
    pool_.share(sequence.pages.back());
  }
  sequence.prefix = prefixes[static_cast<size_t>(sequence.committed)];
  pool_.hold(sequence.prefix);
  pool_.drop(prefixes[0]);
  return next_sequence_++;
}

RollingKVCache::Sequence& RollingKVCache::find(int64_t sequence) {
  const auto found = sequences_.find(sequence);
  require_cache(found != sequences_.end(), "sequence must be one that was added, got " + std::to_string(sequence));
  return found->second;
}

void RollingKVCache::remove_sequence(int64_t sequence) {
  Sequence& held = find(sequence);
  // The last page first: it is the first to be taken, and what remains is a prefix.
  for (; !held.pages.empty(); held.pages.pop_back()) pool_.release(held.pages.back());
  pool_.drop(held.prefix);
  sequences_.erase(sequence);
}

void RollingKVCache::discard_sequence(int64_t sequence) {
  const Sequence& held = find(sequence);
  std::set<int32_t> pages(held.pages.begin(), held.pages.end());
  for (const auto* prefix = held.prefix; prefix; prefix = prefix->key->shorter)
    if (prefix->page >= 0) pages.insert(prefix->page);  // behind the window
  for (const int32_t page : pages) pool_.forget_name(page);
  remove_sequence(sequence);
  std::vector<int64_t> unused;
  for (const int32_t page : pages)
    if (pool_.users(page) == 0) unused.push_back(page);
  zero(unused);
  zeroed_.insert(unused.begin(), unused.end());
}

std::vector<int64_t> RollingKVCache::take_zeroed() {
  const std::set<int64_t> pages = std::exchange(zeroed_, {});
  return {pages.begin(), pages.end()};
}

void RollingKVCache::zero(const std::vector<int64_t>& pages) {
  for (const int64_t page : pages)
    for (const auto* layers : {&keys_, &values_})
      for (const torch::Tensor& layer : *layers) layer.select(0, page).zero_();
}

void RollingKVCache::commit(int64_t sequence, const std::vector<int64_t>& ids) {
  Sequence& held = find(sequence);
  for (; held.prefix && (held.committed + 1) * options_.page_size <= held.length; ++held.committed) {
    held.prefix = pool_.extend(held.prefix, ids.data() + held.committed * options_.page_size);
    if (held.committed < held.first) continue;  // it went back to the pool
    int32_t& page = held.pages[static_cast<size_t>(held.committed - held.first)];
    if (held.prefix->page < 0) {
      pool_.name(page, held.prefix);
    } else {  // another sequence has computed the same tokens: share its page
      pool_.share(held.prefix->page);
      pool_.release(page);
      page = held.prefix->page;
    }
  }
  release_pages(held);
}

bool RollingKVCache::truncate(int64_t sequence, int64_t length) {
  Sequence& held = find(sequence);
  const int64_t least = held.committed * options_.page_size;
  require_cache(length >= least && length <= held.length, "truncate expected a length in [" + std::to_string(least) +
                                                              ", " + std::to_string(held.length) + "], got " +
                                                              std::to_string(length));
  const auto range = visible_pages(length, 0);
  if (range.first < held.first) return false;
  held.length = length;
  for (; held.first + static_cast<int64_t>(held.pages.size()) > range.end; held.pages.pop_back())
    pool_.release(held.pages.back());
  release_pages(held);
  return true;
}

// ---- keys and values outside the cache

RollingKVCache::Contents RollingKVCache::contents(int64_t sequence) const {
  const Sequence& held = sequences_.at(sequence);
  const auto pages =
      torch::tensor(std::vector<int64_t>(held.pages.begin(), held.pages.end()), torch::kInt64).to(options_.device);
  Contents contents{held.length, {}, {}};
  for (const torch::Tensor& layer : keys_) contents.keys.push_back(layer.index_select(0, pages).cpu());
  for (const torch::Tensor& layer : values_) contents.values.push_back(layer.index_select(0, pages).cpu());
  return contents;
}

void RollingKVCache::load(const Contents& contents, const std::vector<int64_t>& ids, int64_t kind) {
  const int64_t count = contents.keys.at(0).size(0);
  const auto visible = visible_pages(contents.length, 0);
  require_cache(count >= visible.end - visible.first && count <= visible.end,
                "contents of " + std::to_string(contents.length) + " tokens must have " +
                    std::to_string(visible.end - visible.first) + " to " + std::to_string(visible.end) +
                    " pages, got " + std::to_string(count));
  if (count > pages_available()) {
    throw OutOfMemory(std::string(kName) + ": has no room for a prompt cache of " + std::to_string(count) +
                      " pages, only for " + std::to_string(pages_available()));
  }
  const int64_t id = add_sequence({}, 0, kind);
  Sequence& sequence = find(id);
  sequence.length = contents.length;
  sequence.first = visible.end - count;
  take_pages(sequence, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t page = sequence.pages[static_cast<size_t>(i)];
    for (size_t layer = 0; layer < keys_.size(); ++layer) {
      keys_[layer].select(0, page).copy_(contents.keys.at(layer).select(0, i));
      values_[layer].select(0, page).copy_(contents.values.at(layer).select(0, i));
    }
  }
  commit(id, ids);
  remove_sequence(id);
}

// ---- pages

RollingKVCache::PageRange RollingKVCache::visible_pages(int64_t length, int64_t tokens) const {
  // The first new query sees the keys from length - (W - 1) on; later queries see no older one.
  const int64_t oldest_key = config_.window > 0 ? std::max<int64_t>(0, length - config_.window + 1) : 0;
  return {oldest_key / options_.page_size, ceil_div(length + tokens, options_.page_size)};
}

void RollingKVCache::check(const std::vector<Chunk>& chunks) const {
  require_cache(!chunks.empty(), "chunks must not be empty");
  std::set<int64_t> seen;
  int64_t needed = 0;  // pages taken less pages given back
  for (const Chunk& chunk : chunks) {
    const auto found = sequences_.find(chunk.sequence);
    require_cache(found != sequences_.end(),
                  "sequence must be one that was added, got " + std::to_string(chunk.sequence));
    require_cache(seen.insert(chunk.sequence).second,
                  "a sequence must have one chunk per batch, got two of sequence " + std::to_string(chunk.sequence));
    const int64_t tokens = static_cast<int64_t>(chunk.input_ids.size());
    require_cache(
        tokens > 0 && tokens <= options_.max_chunk,
        "a chunk must have 1 to " + std::to_string(options_.max_chunk) + " tokens, got " + std::to_string(tokens));
    const Sequence& sequence = found->second;
    needed += pages_to_take(sequence, tokens);
    if (!sequence.prefix) needed -= visible_pages(sequence.length, 0).first - sequence.first;  // nobody shares these
  }
  require_cache(needed <= pages_available(), "the batch needs " + std::to_string(needed) + " more pages, got " +
                                                 std::to_string(pages_available()) + " free");
}

void RollingKVCache::release_pages(Sequence& sequence) {
  const int64_t first = visible_pages(sequence.length, 0).first;
  for (; sequence.first < first; ++sequence.first) {
    pool_.release(sequence.pages.front());
    sequence.pages.pop_front();
  }
}

int64_t RollingKVCache::pages_to_take(const Sequence& sequence, int64_t tokens) const {
  const int64_t end = visible_pages(sequence.length, tokens).end;
  return std::max<int64_t>(0, end - sequence.first - static_cast<int64_t>(sequence.pages.size()));
}

void RollingKVCache::take_pages(Sequence& sequence, int64_t tokens) {
  for (int64_t left = pages_to_take(sequence, tokens); left > 0; --left) sequence.pages.push_back(pool_.take());
}

bool RollingKVCache::reserve(int64_t sequence, int64_t tokens) {
  Sequence& held = find(sequence);
  if (pages_to_take(held, tokens) > pages_available()) return false;
  take_pages(held, tokens);
  return true;
}

Batch RollingKVCache::prepare(const std::vector<Chunk>& chunks) { return lay_out(chunks).to(options_.device); }

HostBatch RollingKVCache::lay_out(const std::vector<Chunk>& chunks) {
  check(chunks);
  HostBatch host;
  // Every sequence gives back before one takes: check() counted on that.
  for (const Chunk& chunk : chunks) release_pages(sequences_.at(chunk.sequence));
  for (const Chunk& chunk : chunks) {
    Sequence& sequence = sequences_.at(chunk.sequence);
    take_pages(sequence, static_cast<int64_t>(chunk.input_ids.size()));
    host.columns = std::max(host.columns, static_cast<int64_t>(sequence.pages.size()));
  }
  // Any number of columns that holds the visible pages will do: the table is laid out anew for every batch. Powers of
  // two are few: batches that a graph was captured for come again (decode_graphs.h).
  host.columns = round_up_to_power_of_two(host.columns);
  host.page_table.assign(chunks.size() * static_cast<size_t>(host.columns), -1);

  const int64_t page_size = options_.page_size;
  int64_t* row = host.page_table.data();
  for (const Chunk& chunk : chunks) {
    Sequence& sequence = sequences_.at(chunk.sequence);
    const int64_t begin = sequence.length;
    sequence.length += static_cast<int64_t>(chunk.input_ids.size());
    host.add_tokens(chunk.input_ids, begin);
    host.kv_lens.push_back(sequence.length);
    for (int64_t p = begin; p < sequence.length; ++p) {
      const int64_t page = sequence.pages[static_cast<size_t>(p / page_size - sequence.first)];
      host.slot_mapping.push_back(page * page_size + p % page_size);
    }
    for (size_t i = 0; i < sequence.pages.size(); ++i)
      row[(sequence.first + static_cast<int64_t>(i)) % host.columns] = sequence.pages[i];
    row += host.columns;
  }
  return host;
}

torch::Tensor RollingKVCache::keys(int64_t layer) const { return keys_.at(static_cast<size_t>(layer)); }
torch::Tensor RollingKVCache::values(int64_t layer) const { return values_.at(static_cast<size_t>(layer)); }
int64_t RollingKVCache::length(int64_t sequence) const { return sequences_.at(sequence).length; }

int64_t RollingKVCache::pages_held(int64_t sequence) const {
  return static_cast<int64_t>(sequences_.at(sequence).pages.size());
}

void RollingKVCache::check_integrity() const {
  std::vector<int64_t> users(static_cast<size_t>(num_pages()));
  std::vector<PagePool::Prefix*> prefixes;
  for (const auto& [id, sequence] : sequences_) {
    for (const int32_t page : sequence.pages) ++users.at(static_cast<size_t>(page));
    if (sequence.prefix) prefixes.push_back(sequence.prefix);
    const auto held = visible_pages(sequence.length, 0);
    if (sequence.first > held.first || sequence.first + pages_held(id) < held.end)
      throw std::logic_error("RollingKVCache: sequence " + std::to_string(id) + " lacks a page");
  }
  pool_.check_integrity(users, prefixes);
}

}  // namespace mixtral
