#include "grouped_gemm.h"

#include <type_traits>

#include "../cuda/kernel_choice.h"
#include "../dispatch.h"
#include "../pack_weight/weight_view.h"
#include "../steps.h"
#include "../swiglu/swiglu.h"
#include "gemm_work.h"
#include "hopper/grouped_gemm_stream_hopper.h"
#include "hopper/grouped_gemm_tile_hopper.h"

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

// a [M, Kdim], contiguous, as it meets weights of fp8.
Tensor round_to_e4m3(const Tensor& a) {
  const Tensor rounded = new_tensor(a, {a.size(0), a.size(1)});
  parallel_rows(a.size(0), a.size(1), [&](int64_t begin, int64_t end) {
    launch_round_to_e4m3_cpu(const_ptr<BFloat16>(a), a.size(1), mutable_ptr<BFloat16>(rounded), begin, end);
  });
  return rounded;
}

#ifdef MIXTRAL_WITH_HOPPER
// A product that the kernels which stream weights take. For fp8, a goes through a workspace of e4m3 numbers.
void launch_stream_on_hopper(const char* op, const Tensor& a, const GroupedGemm<BFloat16>& gemm,
                             const RoutedRows& routed, bool swiglu, cudaStream_t stream) {
  if (gemm.b.format != WeightFormat::kFp8)
    return check_launch(op, launch_grouped_gemm_stream_hopper(gemm, routed, swiglu, stream));
  const Tensor values = new_tensor(a, {gemm.rows, gemm.b.depth}, ScalarType::Byte);
  const Tensor scales = new_tensor(a, {gemm.rows}, ScalarType::Float);
  const E4m3Rows rows{mutable_ptr<uint8_t>(values), mutable_ptr<float>(scales)};
  check_launch(op, launch_quantize_rows_hopper(gemm.a, rows, gemm.rows, gemm.b.depth, stream));
  check_launch(op, launch_grouped_gemm_stream_e4m3_hopper(gemm, rows, routed, swiglu, stream));
}
#endif

template <typename T>
void launch_on_cuda(const char* op, const Tensor& a, const GroupedGemm<T>& gemm, bool swiglu);

// Plain weights in place of packed ones; and for fp8, rows of a that are what they are rounded to.
template <typename T>
void launch_unpacked_on_cuda(const char* op, const Tensor& a, const GroupedGemm<T>& gemm, bool swiglu,
                             cudaStream_t stream) {
  const Tensor weight = new_tensor(a, {gemm.b.experts, gemm.b.columns, gemm.b.depth});
  check_launch(op, launch_unpack_weight_cuda(gemm.b, mutable_ptr<T>(weight), stream));
  GroupedGemm<T> unpacked = gemm;
  unpacked.b.format = WeightFormat::kPlain;
  unpacked.b.data = weight.const_data_ptr();
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (gemm.b.format == WeightFormat::kFp8) {
      const Tensor rounded = new_tensor(a, {gemm.rows, gemm.b.depth});
      check_launch(op, launch_round_to_e4m3_cuda(gemm.a, gemm.b.depth, mutable_ptr<T>(rounded), gemm.rows, stream));
      unpacked.a = const_ptr<T>(rounded);
      return launch_on_cuda(op, a, unpacked, swiglu);
    }
  }
  launch_on_cuda(op, a, unpacked, swiglu);
}

// The kernels for Hopper where they were asked for and take the product: those which stream weights, few rows of plain
// and int4 weights and any of fp8; the others get packed weights unpacked. The simple ones have no swiglu of their own.
template <typename T>
void launch_on_cuda(const char* op, const Tensor& a, const GroupedGemm<T>& gemm, bool swiglu) {
  const CudaScope scope(a);
  [[maybe_unused]] const bool hopper = use_hopper_kernels(a);  // throws where the build has none
#ifdef MIXTRAL_WITH_HOPPER
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (hopper && takes_grouped_gemm_stream_hopper(gemm, swiglu))
      return launch_stream_on_hopper(op, a, gemm, {}, swiglu, scope.stream());
    if (hopper && takes_grouped_gemm_tile_hopper(gemm, swiglu))
      return check_launch(op, launch_grouped_gemm_tile_hopper(gemm, swiglu, scope.stream()));
  }
#endif
  if (gemm.b.format != WeightFormat::kPlain) return launch_unpacked_on_cuda(op, a, gemm, swiglu, scope.stream());
  if (!swiglu) return check_launch(op, launch_grouped_gemm_cuda(gemm, scope.stream()));
  const Tensor gate_up = new_tensor(a, {gemm.rows, gemm.b.columns});
  GroupedGemm<T> product = gemm;
  product.out = mutable_ptr<T>(gate_up);
  check_launch(op, launch_grouped_gemm_cuda(product, scope.stream()));
  check_launch(op, launch_swiglu_cuda(const_ptr<T>(gate_up), gemm.out, gemm.rows, gemm.b.columns / 2, scope.stream()));
}

// With `swiglu`, out is swiglu of the product.
void run(const char* op, const Tensor& a, const char* b_name, const Tensor& b, const Tensor& offs, const Tensor& out,
         bool swiglu) {
  const Tensor b_contiguous = as_contiguous(b), offs_contiguous = as_contiguous(offs);
  const WeightView weight = view_weight(op, b_name, b_contiguous, a.scalar_type(), "[E, N, Kdim]");
  Tensor a_contiguous = as_contiguous(a);
  if (weight.format == WeightFormat::kFp8 && !a.is_cuda()) a_contiguous = round_to_e4m3(a_contiguous);
  const int64_t rows = a.size(0), columns = swiglu ? weight.columns / 2 : weight.columns;
  const IndexArray ends = index_array(offs_contiguous);
  if (!a.is_cuda()) check_offsets(op, ends, weight.experts, rows);
  dispatch_float(op, a.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const GroupedGemm<T> gemm{const_ptr<T>(a_contiguous), weight, ends, mutable_ptr<T>(out), rows};
    if constexpr (kWithCuda) {
      if (a.is_cuda()) return launch_on_cuda(op, a, gemm, swiglu);
    }
    if (out.numel() == 0) return;
    const int64_t blocks = ceil_div(columns, kBlockRows), threads = torch::stable::get_num_threads();
    GemmWork work(ends, weight.experts, blocks, threads);
    parallel_rows(threads, rows * blocks * kBlockRows * weight.depth / 8 / threads, [&](int64_t, int64_t) {
      swiglu ? launch_grouped_gemm_swiglu_cpu(gemm, work) : launch_grouped_gemm_cpu(gemm, work);
    });
  });
}

}  // namespace

void grouped_gemm_step(const char* op, const char* b_name, const Tensor& a, const Tensor& b, const Tensor& offs,
                       const Tensor& out) {
  run(op, a, b_name, b, offs, out, false);
}

void grouped_gemm_swiglu_step(const char* op, const char* b_name, const Tensor& a, const Tensor& b, const Tensor& offs,
                              const Tensor& out) {
  run(op, a, b_name, b, offs, out, true);
}

#ifdef MIXTRAL_WITH_HOPPER
Tensor grouped_gemm_routed_step(const char* op, const char* b_name, const Tensor& a, const Tensor& b, const Tensor& ids,
                                bool ids_ready, bool swiglu) {
  const Tensor a_contiguous = as_contiguous(a), b_contiguous = as_contiguous(b);
  const WeightView weight = view_weight(op, b_name, b_contiguous, a.scalar_type(), "[E, N, Kdim]");
  const int64_t rows = a.size(0), copies = ids.numel(), columns = swiglu ? weight.columns / 2 : weight.columns;
  const Tensor out = new_tensor(a, {copies, columns});
  const GroupedGemm<BFloat16> gemm{const_ptr<BFloat16>(a_contiguous), weight, {}, mutable_ptr<BFloat16>(out), rows};
  const CudaScope scope(a);
  launch_stream_on_hopper(op, a, gemm, {index_array(ids), copies / rows, ids_ready}, swiglu, scope.stream());
  return out;
}
#endif

namespace {

// a [M, Kdim], b [E, N, Kdim] plain or packed, offs [E] -> [M, N]
Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& offs) {
  constexpr const char* op = "grouped_gemm";
  check_rank(op, "a", a, 2, "[M, Kdim]");
  check_float(op, "a", a);
  const WeightView weight = view_weight(op, "b", b, a.scalar_type(), "[E, N, Kdim]");
  check_weight_shape(op, "b", b, weight, weight.columns, a.size(1));
  check_same_device(op, "b", b, a);
  check_rank(op, "offs", offs, 1, "[E]");
  check_size(op, "offs", offs, 0, b.size(0));
  check_index(op, "offs", offs);
  check_same_device(op, "offs", offs, a);
  const Tensor out = new_tensor(a, {a.size(0), weight.columns});
  grouped_gemm_step(op, "b", a, b, offs, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }
#endif

}  // namespace mixtral
