#include "packed_passes.h"

#include <algorithm>
#include <cstddef>

#include "require.h"

namespace mixtral {

void check_sequences(const MixtralImpl& model, const std::vector<std::vector<int64_t>>& sequences,
                     const std::function<std::string(size_t)>& name) {
  require(!sequences.empty(), "there must be at least one sequence of tokens");
  const int64_t context = model.config().max_position;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto length = static_cast<int64_t>(sequences[i].size());
    require(length > 0, name(i) + " must not be empty");
    require(length <= context,
            name(i) + " must fit the context of " + std::to_string(context) + " tokens, got " + std::to_string(length));
    model.check_ids(sequences[i].data(), length);
  }
}

void for_each_pass(const MixtralImpl& model, const std::vector<std::vector<int64_t>>& sequences, int64_t chunk_size,
                   const std::function<void(Batch batch, RollingKVCache& cache)>& pass) {
  size_t longest = 0;
  for (const auto& sequence : sequences) longest = std::max(longest, sequence.size());
  // One sequence may go on from the pass before; those that begin hold at most the tokens of the pass.
  const Config& config = model.config();
  const int64_t pages = RollingKVCache::pages_needed(config, kPageSize, chunk_size, static_cast<int64_t>(longest)) +
                        (chunk_size + kPageSize - 1) / kPageSize + kMaxBatch;
  RollingKVCache cache(model.cache_config(), {kPageSize, pages, chunk_size, model.device(), model.dtype()});
  std::vector<int64_t> open;  // cache ids of the sequences in the pass
  std::vector<RollingKVCache::Chunk> chunks;
  int64_t room = chunk_size;
  const auto run = [&] {
    if (!chunks.empty()) pass(cache.prepare(chunks), cache);
    chunks.clear();
    room = chunk_size;
  };
  for (const auto& sequence : sequences) {
    open.push_back(cache.add_sequence());
    for (size_t begin = 0; begin < sequence.size();) {
      const size_t end = std::min(sequence.size(), begin + static_cast<size_t>(room));
      chunks.push_back({open.back(),
                        {sequence.begin() + static_cast<std::ptrdiff_t>(begin),
                         sequence.begin() + static_cast<std::ptrdiff_t>(end)}});
      room -= static_cast<int64_t>(end - begin);
      begin = end;
      if (room > 0 && chunks.size() < kMaxBatch) continue;
      run();
      const bool goes_on = end < sequence.size();
      for (size_t i = 0; i + (goes_on ? 1 : 0) < open.size(); ++i) cache.remove_sequence(open[i]);
      open = goes_on ? std::vector<int64_t>{open.back()} : std::vector<int64_t>();
    }
  }
  run();
}

}  // namespace mixtral
