#include "fingerprint.h"

#include "../checkpoint/save.h"
#include "../io/hash64.h"
#include "../model/transformer.h"

namespace mixtral {

uint64_t fingerprint(const MixtralImpl& model, const Config& config) {
  Hash64 hash;
  hash.add(config_json(config) + model.weight_type().name() + (model.device().is_cuda() ? "cuda" : "cpu"));
  const uint64_t weights = model.weight_hash();
  hash.add(&weights, sizeof weights);
  return hash.value();
}

}  // namespace mixtral
