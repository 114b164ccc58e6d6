// Picks the next tokens of a batch on the device of its logits. On CUDA, sampling on the host would take longer than
// the decode step when the vocabulary is large, and the logits would have to be copied.
#pragma once

#include <vector>

#include "../model/libtorch.h"
#include "sampling.h"

namespace mixtral {

// logits f32 [B,vocab], one sampler per row -> one token per row, the same as Sampler::next picks. A row that next()
// would throw for (NaN or infinity) gives -1 and leaves its sampler as it was. Masks are for Sampler::next alone.
std::vector<int64_t> sample_batch(const torch::Tensor& logits, const std::vector<Sampler*>& samplers);

}  // namespace mixtral
