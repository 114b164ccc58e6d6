#include "fingerprint.h"

#include <algorithm>
#include <string>

#include "../checkpoint/save.h"
#include "../io/hash64.h"
#include "../model/transformer.h"

namespace mixtral {
namespace {

constexpr int64_t kSampledWeights = 4096;  // of each parameter

}  // namespace

uint64_t fingerprint(const MixtralImpl& model, const Config& config) {
  Hash64 hash;
  hash.add(config_json(config) + model.weight_type().name() + (model.device().is_cuda() ? "cuda" : "cpu"));
  for (const auto& item : model.named_parameters()) {
    const auto weights = item.value().flatten();
    const int64_t step = std::max<int64_t>(weights.numel() / kSampledWeights, 1);
    const auto sampled = weights.slice(0, 0, weights.numel(), step).cpu().contiguous();
    hash.add(sampled.data_ptr(), sampled.nbytes());
  }
  return hash.value();
}

}  // namespace mixtral
