#include "rolling_kv_cache.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>

#include "../ops/host_device.h"
#include "memory.h"

namespace mixtral {
namespace {

constexpr const char* kName = "the key/value cache";  // in errors

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("RollingKVCache: " + message);
}

}  // namespace

RollingKVCache::RollingKVCache(const Config& config, Options options) : config_(config), options_(options) {
  require(options.page_size > 0, "page_size must be > 0, got " + std::to_string(options.page_size));
  require(options.max_chunk > 0, "max_chunk must be > 0, got " + std::to_string(options.max_chunk));
  require(options.num_pages > 0 && options.num_pages <= INT32_MAX,
          "num_pages must be in [1, 2^31), got " + std::to_string(options.num_pages));
  require(options.padding_tokens >= 0, "padding_tokens must be >= 0, got " + std::to_string(options.padding_tokens));
  const double pages =
      static_cast<double>(options.num_pages) + static_cast<double>(ceil_div(options.padding_tokens, options.page_size));
  check_memory(kName, pages * static_cast<double>(page_bytes(config, options.page_size, options.dtype)),
               options.device.str());
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    for (auto* pool : {&keys_, &values_}) pool->push_back(new_pool(options.num_pages));
  }
  // Taken from the back: the lowest page first.
  for (int64_t page = options.num_pages; page-- > 0;) free_pages_.push_back(static_cast<int32_t>(page));
}

// The pages of one layer's keys or values, those for padding included.
torch::Tensor RollingKVCache::new_pool(int64_t num_pages) const {
  const int64_t pages = num_pages + ceil_div(options_.padding_tokens, options_.page_size);
  return torch::empty({pages, options_.page_size, config_.num_kv_heads, config_.head_dim},
                      torch::dtype(options_.dtype).device(options_.device));
}

int64_t RollingKVCache::page_bytes(const Config& config, int64_t page_size, torch::ScalarType dtype) {
  return page_size * config.kv_bytes_per_token(static_cast<int64_t>(c10::elementSize(dtype)));
}

double RollingKVCache::bytes_to_grow(int64_t num_pages) const {
  const double page = static_cast<double>(page_bytes(config_, options_.page_size, options_.dtype));
  const double old_layer = page * static_cast<double>(options_.num_pages) / static_cast<double>(config_.num_layers);
  return page * static_cast<double>(num_pages - options_.num_pages) + old_layer;
}

void RollingKVCache::grow(int64_t num_pages) {
  require(
      num_pages >= options_.num_pages && num_pages <= INT32_MAX,
      "grow expected " + std::to_string(options_.num_pages) + " to 2^31 - 1 pages, got " + std::to_string(num_pages));
  check_memory(kName, bytes_to_grow(num_pages), options_.device.str());
  free_pages_.reserve(static_cast<size_t>(num_pages));
  // If this throws, some layers have pages that nothing uses.
  for (auto* layers : {&keys_, &values_}) {
    for (torch::Tensor& pool : *layers) {
      torch::Tensor larger = new_pool(num_pages);
      larger.narrow(0, 0, options_.num_pages).copy_(pool.narrow(0, 0, options_.num_pages));
      pool = std::move(larger);
    }
  }
  // Below the free pages there are: those go first.
  std::vector<int32_t> added;
  for (int64_t page = num_pages; page-- > options_.num_pages;) added.push_back(static_cast<int32_t>(page));
  free_pages_.insert(free_pages_.begin(), added.begin(), added.end());
  options_.num_pages = num_pages;
}

int64_t RollingKVCache::pages_needed(const Config& config, int64_t page_size, int64_t max_chunk, int64_t length) {
  const int64_t all = ceil_div(length, page_size);
  if (config.window == 0) return all;
  return std::min(all, ceil_div(config.window - 1 + max_chunk, page_size) + 1);
}

int64_t RollingKVCache::add_sequence() {
  sequences_.emplace(next_sequence_, Sequence{});
  return next_sequence_++;
}

RollingKVCache::Contents RollingKVCache::contents(int64_t sequence) const {
  const Sequence& held = sequences_.at(sequence);
  const auto pages =
      torch::tensor(std::vector<int64_t>(held.pages.begin(), held.pages.end()), torch::kInt64).to(options_.device);
  Contents contents{held.length, {}, {}};
  for (const torch::Tensor& layer : keys_) contents.keys.push_back(layer.index_select(0, pages).cpu());
  for (const torch::Tensor& layer : values_) contents.values.push_back(layer.index_select(0, pages).cpu());
  return contents;
}

int64_t RollingKVCache::add_sequence(const Contents& contents) {
  const int64_t count = contents.keys.at(0).size(0);
  const auto visible = visible_pages(contents.length, 0);
  require(count >= visible.end - visible.first && count <= visible.end,
          "contents of " + std::to_string(contents.length) + " tokens must have " +
              std::to_string(visible.end - visible.first) + " to " + std::to_string(visible.end) + " pages, got " +
              std::to_string(count));
  require(count <= static_cast<int64_t>(free_pages_.size()),
          "the contents need " + std::to_string(count) + " pages, got " + std::to_string(free_pages_.size()) + " free");
  Sequence sequence;
  sequence.length = contents.length;
  sequence.first = visible.end - count;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t page = free_pages_.back();
    free_pages_.pop_back();
    sequence.pages.push_back(page);
    for (size_t layer = 0; layer < keys_.size(); ++layer) {
      keys_[layer].select(0, page).copy_(contents.keys.at(layer).select(0, i));
      values_[layer].select(0, page).copy_(contents.values.at(layer).select(0, i));
    }
  }
  sequences_.emplace(next_sequence_, std::move(sequence));
  return next_sequence_++;
}

RollingKVCache::Sequence& RollingKVCache::find(int64_t sequence) {
  const auto found = sequences_.find(sequence);
  require(found != sequences_.end(), "sequence must be one that was added, got " + std::to_string(sequence));
  return found->second;
}

void RollingKVCache::remove_sequence(int64_t sequence) {
  const auto& pages = find(sequence).pages;
  free_pages_.insert(free_pages_.end(), pages.begin(), pages.end());
  sequences_.erase(sequence);
}

void RollingKVCache::clear_sequence(int64_t sequence) {
  for (const int32_t page : find(sequence).pages)
    for (auto* layers : {&keys_, &values_})
      for (torch::Tensor& pool : *layers) pool.select(0, page).zero_();
}

bool RollingKVCache::truncate(int64_t sequence, int64_t length) {
  Sequence& held = find(sequence);
  require(length >= 0 && length <= held.length,
          "truncate expected a length in [0, " + std::to_string(held.length) + "], got " + std::to_string(length));
  const auto range = visible_pages(length, 0);
  if (range.first < held.first) return false;
  held.length = length;
  for (; held.first + static_cast<int64_t>(held.pages.size()) > range.end; held.pages.pop_back())
    free_pages_.push_back(held.pages.back());
  release_pages(held);
  return true;
}

RollingKVCache::PageRange RollingKVCache::visible_pages(int64_t length, int64_t tokens) const {
  // The first new query sees the keys from length - (W - 1) on; later queries see no older one.
  const int64_t oldest_key = config_.window > 0 ? std::max<int64_t>(0, length - config_.window + 1) : 0;
  return {oldest_key / options_.page_size, ceil_div(length + tokens, options_.page_size)};
}

void RollingKVCache::check(const std::vector<Chunk>& chunks) const {
  require(!chunks.empty(), "chunks must not be empty");
  std::set<int64_t> seen;
  int64_t needed = 0;  // pages taken less pages given back
  for (const Chunk& chunk : chunks) {
    const auto found = sequences_.find(chunk.sequence);
    require(found != sequences_.end(), "sequence must be one that was added, got " + std::to_string(chunk.sequence));
    require(seen.insert(chunk.sequence).second,
            "a sequence must have one chunk per batch, got two of sequence " + std::to_string(chunk.sequence));
    const int64_t tokens = static_cast<int64_t>(chunk.input_ids.size());
    require(tokens > 0 && tokens <= options_.max_chunk,
            "a chunk must have 1 to " + std::to_string(options_.max_chunk) + " tokens, got " + std::to_string(tokens));
    const auto range = visible_pages(found->second.length, tokens);
    needed += range.end - range.first - static_cast<int64_t>(found->second.pages.size());
  }
  require(
      needed <= static_cast<int64_t>(free_pages_.size()),
      "the batch needs " + std::to_string(needed) + " more pages, got " + std::to_string(free_pages_.size()) + " free");
}

void RollingKVCache::release_pages(Sequence& sequence) {
  const int64_t first = visible_pages(sequence.length, 0).first;
  for (; sequence.first < first; ++sequence.first) {
    free_pages_.push_back(sequence.pages.front());
    sequence.pages.pop_front();
  }
}

void RollingKVCache::take_pages(Sequence& sequence, int64_t tokens) {
  const int64_t end = visible_pages(sequence.length, tokens).end;
  while (sequence.first + static_cast<int64_t>(sequence.pages.size()) < end) {
    sequence.pages.push_back(free_pages_.back());
    free_pages_.pop_back();
  }
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

int64_t RollingKVCache::pages_in_use() const { return options_.num_pages - static_cast<int64_t>(free_pages_.size()); }

}  // namespace mixtral
