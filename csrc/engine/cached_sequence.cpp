#include "cached_sequence.h"

#include <algorithm>
#include <stdexcept>

namespace mixtral {
namespace {

RollingKVCache cache_for(MixtralImpl& model, int64_t longest, int64_t chunk_size, int64_t page_size) {
  const int64_t chunk = std::min(chunk_size, longest);
  const int64_t pages = RollingKVCache::pages_needed(model.config(), page_size, chunk, longest);
  return {model.cache_config(), {page_size, pages, chunk, model.device(), model.dtype()}};
}

}  // namespace

CachedSequence::CachedSequence(MixtralImpl& model, int64_t longest, int64_t chunk_size, int64_t first_position,
                               int64_t page_size)
    : model_(model),
      chunk_size_(std::min(chunk_size, longest)),
      first_position_(first_position),
      cache_(cache_for(model, longest, chunk_size, page_size)),
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
