// What kernels in headers are written with: number conversions, vectors, reductions, shared memory.
//
// In .cu files these are the functions of common.cuh. The GoogleTests run the same kernels on the CPU, with functions
// of the same names from the GPU emulator, tests/cpp/gpu_emulator/.
#pragma once

#ifdef __CUDACC__
#include "common.cuh"
#else
#include "gpu_emulator/hopper.h"
#endif
