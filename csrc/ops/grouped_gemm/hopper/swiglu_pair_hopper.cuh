// swiglu in the epilogue of a product: two values at a time, with the bits of the rounded product and the op behind it.
#pragma once

#include <cstdint>

#include "../../cuda/kernel_hopper.cuh"
#include "../../swiglu/swiglu_value.cuh"

namespace mixtral::cuda {

// The sums are rounded to bf16 in pairs, and taken apart by a shift and a mask: three packed conversions (F2FP) for two
// values of out. Rounding one value at a time takes six, and they are the slow ones (F2F).
__device__ __forceinline__ uint32_t swiglu_pair(float gate0, float gate1, float up0, float up1) {
  const uint32_t gates = pack_bf16(gate0, gate1), ups = pack_bf16(up0, up1);
  return pack_bf16(swiglu_product<BFloat16>(low_bf16(gates), low_bf16(ups)),
                   swiglu_product<BFloat16>(high_bf16(gates), high_bf16(ups)));
}

}  // namespace mixtral::cuda
