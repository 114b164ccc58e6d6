// The host side of the grouped products on Hopper: which kernel, and its workspace. Only builds with kernels for 9.0a
// have it.
#pragma once

#include "../../pack_weight/weight_view.h"
#include "../grouped_gemm.h"

namespace mixtral {

// Launches the kernel for Hopper that fits the product; false if none does. The kernel that streams weights is for few
// rows with plain weights and for any number of rows with int4 and fp8 ones; the tile kernel is for plain weights. With
// `swiglu`, out is swiglu of the product. `a` is the tensor behind gemm.a.
bool launch_grouped_gemm_hopper(const char* op, const Tensor& a, const GroupedGemm<BFloat16>& gemm, bool swiglu,
                                cudaStream_t stream);

// grouped_gemm, or with `swiglu` grouped_gemm_swiglu, of rows that are not sorted by expert. Requires
// takes_routed_gemm_stream_hopper. Row r C + c of the result is row r of a [R, Kdim] times the weights of expert
// ids[r, c]; ids [R, C] is contiguous. If that expert is outside [0, E), the row is left unwritten. `ids_ready`: see
// RoutedRows.
Tensor grouped_gemm_routed_hopper(const char* op, const Tensor& a, const Weight& b, const Tensor& ids, bool ids_ready,
                                  bool swiglu);

}  // namespace mixtral
