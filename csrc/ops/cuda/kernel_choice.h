// Which CUDA kernels an op runs: the simple ones, for every GPU, or those written for Hopper (compute capability 9.0).
#pragma once

#include "../checks.h"
#include "hopper_asked_for.h"

namespace mixtral {

// True on a Hopper GPU if the environment says MIXTRAL_CUDA_KERNELS=hopper and the build has these kernels. "simple" is
// the default; throws for another value. Both kinds give a token the same bits at every run; only the simple ones give
// it the same bits in every batch.
bool use_hopper_kernels(const Tensor& t);

}  // namespace mixtral
