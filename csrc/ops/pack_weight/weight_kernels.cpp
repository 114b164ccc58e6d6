#include "weight_kernels.h"

#include "../cpu/isa.h"

namespace mixtral {
namespace {

const WeightKernels* kernels_in_use() {
#if defined(__x86_64__)
  switch (cpu::cpu_isa()) {
    case cpu::CpuIsa::kAmx:
      return kAmxWeightKernels;
    case cpu::CpuIsa::kAvx512Bf16:
      return kAvx512Bf16WeightKernels;
    case cpu::CpuIsa::kAvx512:
      return kAvx512WeightKernels;
    case cpu::CpuIsa::kAvx2:
      return kAvx2WeightKernels;
    case cpu::CpuIsa::kBaseline:
      break;
  }
#endif
  return kPlainWeightKernels;
}

}  // namespace

const WeightKernels& weight_kernels(WeightFormat format) {
  static const WeightKernels* const kernels = kernels_in_use();
  return kernels[static_cast<int64_t>(format) - static_cast<int64_t>(WeightFormat::kPacked)];
}

}  // namespace mixtral
