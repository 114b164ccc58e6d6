// Division without a branch: the compiler's a / b calls a function for extreme operands, and a kernel saves registers
// on the stack around a call.
#pragma once

#include "kernel.cuh"  // reciprocal_estimate

namespace mixtral::cuda {

// a / b from 1 / b to within two units in the last place: a Newton step for the reciprocal, then two corrections of the
// quotient by what it leaves of a (Markstein, "IA-64 and Elementary Functions", 2000, chapter 8).
__device__ __forceinline__ float corrected_quotient(float a, float b, float reciprocal) {
  reciprocal = fmaf(fmaf(-b, reciprocal, 1.0f), reciprocal, reciprocal);
  float quotient = a * reciprocal;
  quotient = fmaf(fmaf(-b, quotient, a), reciprocal, quotient);
  return fmaf(fmaf(-b, quotient, a), reciprocal, quotient);
}

// a / b for 1 <= b <= 2^24: rounded to nearest where a is 0 or 2^-70 <= |a| <= 2^100, and for smaller a at most one
// unit in the last place away. NaN where a or b is.
__device__ __forceinline__ float divide(float a, float b) { return corrected_quotient(a, b, reciprocal_estimate(b)); }

}  // namespace mixtral::cuda
