#include "grouped_gemm.h"

#include "../dispatch.h"
#include "../moe_mlp/moe_mlp.h"
#include "tiles.h"

namespace mixtral {
namespace {

// On the CPU, offs must cut all the rows of a into groups.
void check_offsets(const char* op, IndexArray offs, int64_t experts, int64_t rows) {
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; ++e) {
    MIXTRAL_CHECK(offs[e] >= begin, op, ": offs must be >= 0 and must not decrease, got ", offs[e], " after ", begin,
                  " at expert ", e);
    begin = offs[e];
  }
  MIXTRAL_CHECK(begin == rows, op, ": offs must end at the ", rows, " rows of a, got ", begin);
}

}  // namespace

Tensor grouped_gemm_step(const char* op, const Tensor& a, const Tensor& b, const Tensor& offs) {
  const Tensor a_contiguous = torch::stable::contiguous(a), b_contiguous = torch::stable::contiguous(b);
  const Tensor offs_contiguous = torch::stable::contiguous(offs);
  const int64_t experts = b.size(0), rows = a.size(0), columns = b.size(1), depth = a.size(1);
  const IndexArray ends = index_array(offs_contiguous);
  if (!a.is_cuda()) check_offsets(op, ends, experts, rows);
  const Tensor out = torch::stable::new_empty(a, {rows, columns});
  dispatch_float(op, a.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const GroupedGemm<T> gemm{const_ptr<T>(a_contiguous),
                              const_ptr<T>(b_contiguous),
                              ends,
                              mutable_ptr<T>(out),
                              experts,
                              rows,
                              columns,
                              depth};
    if constexpr (kWithCuda) {
      if (a.is_cuda()) {
        const CudaScope scope(a);
        check_launch(op, launch_grouped_gemm_cuda(gemm, scope.stream()));
        return;
      }
    }
    const int64_t tiles = count_gemm_tiles(ends, experts, rows, kGemmBlockRows, ceil_div(columns, kGemmBlockColumns));
    parallel_rows(tiles, rows * columns / std::max<int64_t>(1, tiles) * depth / 8,
                  [&](int64_t begin, int64_t end) { launch_grouped_gemm_cpu(gemm, begin, end); });
  });
  return out;
}

namespace {

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& offs) {
  constexpr const char* op = "grouped_gemm";
  check_rank(op, "a", a, 2, "[M, Kdim]");
  check_float(op, "a", a);
  check_rank(op, "b", b, 3, "[E, N, Kdim]");
  check_size(op, "b", b, 2, a.size(1));
  check_dtype(op, "b", b, a.scalar_type());
  check_same_device(op, "b", b, a);
  check_rank(op, "offs", offs, 1, "[E]");
  check_size(op, "offs", offs, 0, b.size(0));
  check_index(op, "offs", offs);
  check_same_device(op, "offs", offs, a);
  return grouped_gemm_step(op, a, b, offs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }
#endif

}  // namespace mixtral
