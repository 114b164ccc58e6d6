// The user's choice of CUDA kernels, for launchers: kernel_choice.h without torch's headers.
#pragma once

namespace mixtral {

// The environment says MIXTRAL_CUDA_KERNELS=hopper. Throws for a value that is neither this nor "simple", the default.
bool hopper_asked_for();

}  // namespace mixtral
