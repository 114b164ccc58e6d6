#include "cached_sequence.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../io/size.h"
#include "../model/memory.h"

namespace mixtral {

namespace {

int64_t pages_for(const MixtralImpl& model, int64_t longest, int64_t chunk_size) {
  return RollingKVCache::pages_needed(model.config(), kPageSize, std::min(chunk_size, longest), longest);
}

}  // namespace

void check_kv_memory(const MixtralImpl& model, int64_t longest, int64_t chunk_size, int64_t kv_memory) {
  const int64_t bytes = pages_for(model, longest, chunk_size) *
                        RollingKVCache::page_bytes(model.cache_config(), kPageSize, model.dtype());
  if (kv_memory == 0 || bytes <= kv_memory) return;
  throw OutOfMemory("the key/value cache: " + std::to_string(longest) + " tokens need " +
                    bytes_text(static_cast<double>(bytes)) + ", and kv_memory is " +
                    bytes_text(static_cast<double>(kv_memory)) + ": raise it, or give the model a shorter context");
}

RollingKVCache cache_of_one(const MixtralImpl& model, int64_t longest, int64_t chunk_size, int64_t kv_memory) {
  check_kv_memory(model, longest, chunk_size, kv_memory);
  return {
      model.cache_config(),
      {kPageSize, pages_for(model, longest, chunk_size), std::min(chunk_size, longest), model.device(), model.dtype()}};
}

CachedSequence::CachedSequence(MixtralImpl& model, int64_t longest, int64_t chunk_size, int64_t kv_memory,
                               int64_t first_position)
    : model_(model),
      chunk_size_(std::min(chunk_size, longest)),
      first_position_(first_position),
      cache_(cache_of_one(model, longest, chunk_size, kv_memory)),
      sequence_(cache_.add_sequence()) {}

torch::Tensor CachedSequence::feed(const std::vector<int64_t>& ids) {
  std::vector<torch::Tensor> parts;
  for (size_t begin = 0; begin < ids.size(); begin += static_cast<size_t>(chunk_size_)) {
    const size_t end = std::min(ids.size(), begin + static_cast<size_t>(chunk_size_));
    const auto first = ids.begin() + static_cast<int64_t>(begin), last = ids.begin() + static_cast<int64_t>(end);
    const Batch batch = cache_.prepare({{sequence_, {first, last}}});
    if (first_position_ > 0) batch.positions.add_(first_position_);  // where keys lie is the cache's own matter
    parts.push_back(model_.hidden_states(batch, &cache_));
  }
  return parts.size() == 1 ? parts.front() : torch::cat(parts);
}

void CachedSequence::truncate(int64_t length) {
  if (!cache_.truncate(sequence_, length)) throw std::logic_error("CachedSequence: truncated behind the window");
}

}  // namespace mixtral
