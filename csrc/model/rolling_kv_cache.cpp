#include "rolling_kv_cache.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>

#include "memory.h"

namespace mixtral {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("RollingKVCache: " + message);
}

}  // namespace

RollingKVCache::RollingKVCache(const Config& config, Options options) : config_(config), options_(options) {
  require(options.page_size > 0, "page_size must be > 0, got " + std::to_string(options.page_size));
  require(options.max_chunk > 0, "max_chunk must be > 0, got " + std::to_string(options.max_chunk));
  require(options.num_pages > 0 && options.num_pages <= INT32_MAX,
          "num_pages must be in [1, 2^31), got " + std::to_string(options.num_pages));
  const auto token_bytes = config.kv_bytes_per_token(static_cast<int64_t>(c10::elementSize(options.dtype)));
  require(options.padding_tokens >= 0, "padding_tokens must be >= 0, got " + std::to_string(options.padding_tokens));
  const int64_t pages = options.num_pages + ceil_div(options.padding_tokens, options.page_size);
  const double tokens = static_cast<double>(pages) * static_cast<double>(options.page_size);
  check_memory("the key/value cache", static_cast<double>(token_bytes) * tokens, options.device.str());
  const auto tensor_options = torch::dtype(options.dtype).device(options.device);
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    for (auto* pool : {&keys_, &values_})
      pool->push_back(torch::empty({pages, options.page_size, config.num_kv_heads, config.head_dim}, tensor_options));
  }
  // Taken from the back: the lowest page first.
  for (int64_t page = options.num_pages; page-- > 0;) free_pages_.push_back(static_cast<int32_t>(page));
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

void RollingKVCache::remove_sequence(int64_t sequence) {
  const auto found = sequences_.find(sequence);
  require(found != sequences_.end(), "sequence must be one that was added, got " + std::to_string(sequence));
  free_pages_.insert(free_pages_.end(), found->second.pages.begin(), found->second.pages.end());
  sequences_.erase(found);
}

RollingKVCache::PageRange RollingKVCache::visible_pages(const Sequence& sequence, int64_t tokens) const {
  // The first new query sees the keys from length - (W - 1) on; later queries see no older one.
  const int64_t oldest_key = config_.window > 0 ? std::max<int64_t>(0, sequence.length - config_.window + 1) : 0;
  return {oldest_key / options_.page_size, ceil_div(sequence.length + tokens, options_.page_size)};
}

void RollingKVCache::check(const std::vector<Chunk>& chunks) const {
  require(!chunks.empty(), "chunks must not be empty");
  std::set<int64_t> seen;
  int64_t needed = 0;  // minus what goes back
  for (const Chunk& chunk : chunks) {
    const auto found = sequences_.find(chunk.sequence);
    require(found != sequences_.end(), "sequence must be one that was added, got " + std::to_string(chunk.sequence));
    require(seen.insert(chunk.sequence).second,
            "a sequence must have one chunk per batch, got two of sequence " + std::to_string(chunk.sequence));
    const int64_t tokens = static_cast<int64_t>(chunk.input_ids.size());
    require(tokens > 0 && tokens <= options_.max_chunk,
            "a chunk must have 1 to " + std::to_string(options_.max_chunk) + " tokens, got " + std::to_string(tokens));
    const auto range = visible_pages(found->second, tokens);
    needed += range.end - range.first - static_cast<int64_t>(found->second.pages.size());
  }
  require(
      needed <= static_cast<int64_t>(free_pages_.size()),
      "the batch needs " + std::to_string(needed) + " more pages, got " + std::to_string(free_pages_.size()) + " free");
}

void RollingKVCache::release_pages(Sequence& sequence) {
  const int64_t first = visible_pages(sequence, 0).first;
  for (; sequence.first < first; ++sequence.first) {
    free_pages_.push_back(sequence.pages.front());
    sequence.pages.pop_front();
  }
}

void RollingKVCache::take_pages(Sequence& sequence, int64_t tokens) {
  const int64_t end = visible_pages(sequence, tokens).end;
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

int64_t RollingKVCache::pages_in_use() const { return options_.num_pages - static_cast<int64_t>(free_pages_.size()); }

}  // namespace mixtral
