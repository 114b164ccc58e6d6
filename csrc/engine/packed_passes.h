// Whole sequences through the model, many of them in one pass.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../model/rolling_kv_cache.h"
#include "../model/transformer.h"

namespace mixtral {

// Packs the tokens of the sequences, in their order, into passes of at most chunk_size tokens, and calls `pass` with
// each. It must run the model on the batch, over the cache. Throws OutOfMemory when the key/value cache does not fit.
void for_each_pass(const MixtralImpl& model, const std::vector<std::vector<int64_t>>& sequences, int64_t chunk_size,
                   const std::function<void(Batch batch, RollingKVCache& cache)>& pass);

// Throws std::invalid_argument for no sequences, an empty one, one that is longer than the model's context, or an id
// outside the vocabulary. name(i): sequence i, in words.
void check_sequences(const MixtralImpl& model, const std::vector<std::vector<int64_t>>& sequences,
                     const std::function<std::string(size_t)>& name);

}  // namespace mixtral
