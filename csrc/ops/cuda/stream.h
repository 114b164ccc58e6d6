// The CUDA stream type, without the toolkit's headers: launchers can be declared where there is no toolkit.
#pragma once

using cudaStream_t = struct CUstream_st*;
