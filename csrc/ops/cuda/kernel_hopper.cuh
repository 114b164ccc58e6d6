// The same as kernel.cuh for kernels written for Hopper: also mbarriers, TMA and its tensor maps, wgmma.
#pragma once

#include "kernel.cuh"

#ifdef __CUDACC__
#include "tensor_map.cuh"
#include "wgmma.cuh"
#else
#include "gpu_emulator/wgmma.h"
#endif
