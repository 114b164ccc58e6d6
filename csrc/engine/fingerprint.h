// One number that tells models apart.
#pragma once

#include <cstdint>

namespace mixtral {

class MixtralImpl;
struct Config;

// Equal for models that compute the same, in one process or split over ranks: of `config`, which is the model's or a
// variant of it, the types and the device, and MixtralImpl::weight_hash().
uint64_t fingerprint(const MixtralImpl& model, const Config& config);

}  // namespace mixtral
