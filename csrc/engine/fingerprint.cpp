#include "fingerprint.h"

#include <algorithm>
#include <string>

#include "../checkpoint/save.h"
#include "../model/transformer.h"

namespace mixtral {
namespace {

constexpr int64_t kSampledWeights = 4096;  // of each parameter

// FNV-1a (Fowler, Noll, Vo), 64 bits.
void add_to_hash(uint64_t& hash, const void* data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3;
}

}  // namespace

uint64_t fingerprint(const MixtralImpl& model, const Config& config) {
  uint64_t hash = 0xcbf29ce484222325;
  const std::string kind =
      config_json(config) + model.weight_type().name() + (model.device().is_cuda() ? "cuda" : "cpu");
  add_to_hash(hash, kind.data(), kind.size());
  for (const auto& item : model.named_parameters()) {
    const auto weights = item.value().flatten();
    const int64_t step = std::max<int64_t>(weights.numel() / kSampledWeights, 1);
    const auto sampled = weights.slice(0, 0, weights.numel(), step).cpu().contiguous();
    add_to_hash(hash, sampled.data_ptr(), sampled.nbytes());
  }
  return hash;
}

}  // namespace mixtral
