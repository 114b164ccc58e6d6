#include "grouped_gemm_hopper.h"

#include "../../dispatch.h"
#include "../../internal_ops.h"
#include "grouped_gemm_stream_hopper.h"
#include "grouped_gemm_tile_hopper.h"

namespace mixtral {
namespace {

// fp8 weights: a is first rounded to e4m3, in a workspace.
void launch_stream(const char* op, const Tensor& a, const GroupedGemm<BFloat16>& gemm, const RoutedRows& routed,
                   bool swiglu, cudaStream_t stream) {
  if (gemm.b.format != WeightFormat::kFp8)
    return check_launch(op, launch_grouped_gemm_stream_hopper(gemm, routed, swiglu, stream));
  const Tensor values = new_tensor(a, {gemm.rows, gemm.b.depth}, ScalarType::Byte);
  const Tensor scales = new_tensor(a, {gemm.rows}, ScalarType::Float);
  const E4m3Rows rows{mutable_ptr<uint8_t>(values), mutable_ptr<float>(scales)};
  check_launch(op, launch_quantize_rows_hopper(gemm.a, rows, gemm.rows, gemm.b.depth, stream));
  check_launch(op, launch_grouped_gemm_stream_e4m3_hopper(gemm, rows, routed, swiglu, stream));
}

}  // namespace

bool launch_grouped_gemm_hopper(const char* op, const Tensor& a, const GroupedGemm<BFloat16>& gemm, bool swiglu,
                                cudaStream_t stream) {
  if (takes_grouped_gemm_stream_hopper(gemm, swiglu)) {
    launch_stream(op, a, gemm, {}, swiglu, stream);
    return true;
  }
  if (!takes_grouped_gemm_tile_hopper(gemm, swiglu)) return false;
  check_launch(op, launch_grouped_gemm_tile_hopper(gemm, swiglu, stream));
  return true;
}

Tensor grouped_gemm_routed_hopper(const char* op, const Tensor& a, const Weight& b, const Tensor& ids, bool ids_ready,
                                  bool swiglu) {
  const Tensor a_contiguous = as_contiguous(a);
  const int64_t rows = a.size(0), copies = ids.numel(), columns = swiglu ? b.view.columns / 2 : b.view.columns;
  const Tensor out = new_tensor(a, {copies, columns});
  const GroupedGemm<BFloat16> gemm{const_ptr<BFloat16>(a_contiguous), b.view, {}, mutable_ptr<BFloat16>(out), rows};
  const CudaScope scope(a);
  launch_stream(op, a, gemm, {index_array(ids), copies / rows, ids_ready}, swiglu, scope.stream());
  return out;
}

}  // namespace mixtral
