// One sequence in a key/value cache of its own, fed chunk by chunk: for whoever scores texts rather than serves
// requests.
#pragma once

#include <vector>

#include "../model/rolling_kv_cache.h"
#include "../model/transformer.h"

namespace mixtral {

class CachedSequence {
 public:
  // Room for `longest` tokens, at most `chunk_size` at a time. RoPE counts positions from `first_position` on. Throws
  // OutOfMemory when the cache does not fit.
  CachedSequence(MixtralImpl& model, int64_t longest, int64_t chunk_size, int64_t first_position = 0,
                 int64_t page_size = kPageSize);

  // The next tokens -> their hidden states [T,H], for MixtralImpl::logits. Any number of ids.
  torch::Tensor feed(const std::vector<int64_t>& ids);
  // Forgets the tokens from `length` on. Only those of the last chunk are sure to be there to forget.
  void truncate(int64_t length);
  int64_t length() const { return cache_.length(sequence_); }

 private:
  MixtralImpl& model_;
  int64_t chunk_size_, first_position_;
  RollingKVCache cache_;
  int64_t sequence_;
};

}  // namespace mixtral
