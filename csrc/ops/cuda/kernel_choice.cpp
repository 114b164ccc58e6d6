#include "kernel_choice.h"

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <string>

namespace mixtral {
namespace {

bool read_choice() {
  const char* value = std::getenv("MIXTRAL_CUDA_KERNELS");
  const std::string choice = value ? value : "simple";
  MIXTRAL_CHECK(choice == "simple" || choice == "hopper", "MIXTRAL_CUDA_KERNELS must be simple or hopper, got \"",
                choice, "\"");
  return choice == "hopper";
}

}  // namespace

bool hopper_asked_for() {
  static const bool asked = read_choice();
  return asked;
}

bool use_hopper_kernels(const Tensor& t) {
#ifdef MIXTRAL_WITH_HOPPER
  if (!hopper_asked_for()) return false;
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index());
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.get_device_index());
  return major == 9 && minor == 0;
#else
  (void)t;
  MIXTRAL_CHECK(!hopper_asked_for(),
                "MIXTRAL_CUDA_KERNELS=hopper: this build has no kernels for compute capability 9.0a");
  return false;
#endif
}

}  // namespace mixtral
