// One sequence in a key/value cache of its own, fed chunk by chunk: for whoever scores texts rather than serves
// requests.
#pragma once

#include <vector>

#include "../model/rolling_kv_cache.h"
#include "../model/transformer.h"

namespace mixtral {

// A cache for one sequence of `longest` tokens, fed at most `chunk_size` at a time. Throws OutOfMemory when that does
// not fit `kv_memory` bytes (0: any number) or the device.
RollingKVCache cache_of_one(const MixtralImpl& model, int64_t longest, int64_t chunk_size, int64_t kv_memory);
// Throws OutOfMemory when such a cache does not fit `kv_memory` bytes: for who makes several, before the first.
void check_kv_memory(const MixtralImpl& model, int64_t longest, int64_t chunk_size, int64_t kv_memory);

class CachedSequence {
 public:
  // As cache_of_one(). RoPE counts positions from `first_position` on.
  CachedSequence(MixtralImpl& model, int64_t longest, int64_t chunk_size, int64_t kv_memory = 0,
                 int64_t first_position = 0);

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
