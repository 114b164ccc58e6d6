// Runs the tokens of a trace through the experts that it names.
#pragma once

#include <filesystem>

#include "../model/libtorch.h"
#include "replays.h"
#include "trace.h"

namespace mixtral {

// -> logits f32 [N,vocab] on the CPU, after every token: those of the traced run, bit for bit, while the trace is as it
// was written. Of `options`, chunk_size and progress count. Throws std::invalid_argument for a trace of another model
// or one whose parts do not fit each other.
torch::Tensor replay(MixtralImpl& model, const Trace& trace, const TraceOptions& options);

// The sequences of a trace file, for requests. Throws LoadError, also for a trace of another model.
Replays read_replays(const std::filesystem::path& path, const MixtralImpl& model);

}  // namespace mixtral
