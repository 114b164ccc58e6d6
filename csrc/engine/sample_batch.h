// The next tokens of a batch, picked where its logits lie: on CUDA the host would need longer for a large vocabulary
// than the model for a step, and copying the logits costs as well.
#pragma once

#include <vector>

#include "../model/libtorch.h"
#include "sampling.h"

namespace mixtral {

// logits f32 [B,vocab], a sampler for each row -> a token for each, as Sampler::next defines it. -1 where next() would
// throw: the row holds NaN or infinity, and its sampler stays as it was.
std::vector<int64_t> sample_batch(const torch::Tensor& logits, const std::vector<Sampler*>& samplers);

}  // namespace mixtral
