// Runs the tokens of a trace through the experts that it names.
#pragma once

#include <functional>
#include <vector>

#include "../model/rolling_kv_cache.h"
#include "trace.h"

namespace mixtral {

// -> logits f32 [N,vocab] on the CPU, after every token: those of the traced run, bit for bit, while the trace is as it
// was written. Of `options`, chunk_size and progress count. Throws std::invalid_argument for a trace of another model
// or one whose parts do not fit each other.
torch::Tensor replay(MixtralImpl& model, const Trace& trace, const TraceOptions& options);

// Packs the tokens of the sequences, in their order, into passes of at most chunk_size tokens, and calls `pass` with
// each. It must run the model on the batch, over the cache.
void for_each_pass(MixtralImpl& model, const std::vector<TraceSequence>& sequences, int64_t chunk_size,
                   const std::function<void(Batch batch, RollingKVCache& cache)>& pass);

}  // namespace mixtral
