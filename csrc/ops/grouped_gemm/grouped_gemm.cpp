#include "grouped_gemm.h"

#include <optional>
#include <type_traits>

#include "../cuda/kernel_choice.h"
#include "../dispatch.h"
#include "../internal_ops.h"
#include "../swiglu/swiglu.h"
#include "gemm_work.h"
#ifdef MIXTRAL_WITH_HOPPER
#include "hopper/grouped_gemm_hopper.h"
#endif

namespace mixtral {

void internal::check_offsets(const char* op, const char* name, IndexArray offs, int64_t experts, int64_t rows) {
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; ++e) {
    MIXTRAL_CHECK(offs[e] >= begin, op, ": offs must be >= 0 and must not decrease, got ", offs[e], " after ", begin,
                  " at expert ", e);
    begin = offs[e];
  }
  MIXTRAL_CHECK(begin == rows, op, ": offs must end at the ", rows, " rows of ", name, ", got ", begin);
}

namespace {

// a [M, Kdim], contiguous, rounded for a product with weights of fp8.
Tensor round_to_e4m3(const Tensor& a) {
  const Tensor rounded = new_tensor(a, {a.size(0), a.size(1)});
  parallel_rows(a.size(0), a.size(1), [&](int64_t begin, int64_t end) {
    launch_round_to_e4m3_cpu(const_ptr<BFloat16>(a), a.size(1), mutable_ptr<BFloat16>(rounded), begin, end);
  });
  return rounded;
}

template <typename T>
bool launch_if_hopper(const char* op, const Tensor& a, const GroupedGemm<T>& gemm, bool swiglu, cudaStream_t stream) {
  [[maybe_unused]] const bool hopper = use_hopper_kernels(a);  // throws if they are asked for and the build has none
#ifdef MIXTRAL_WITH_HOPPER
  if constexpr (std::is_same_v<T, BFloat16>) return hopper && launch_grouped_gemm_hopper(op, a, gemm, swiglu, stream);
#endif
  return false;
}

// Plain weights and the simple kernels, which have no swiglu of their own.
template <typename T>
void launch_simple_on_cuda(const char* op, const Tensor& a, const GroupedGemm<T>& gemm, bool swiglu,
                           cudaStream_t stream) {
  if (!swiglu) return check_launch(op, launch_grouped_gemm_cuda(gemm, stream));
  const Tensor gate_up = new_tensor(a, {gemm.rows, gemm.b.columns});
  GroupedGemm<T> product = gemm;
  product.out = mutable_ptr<T>(gate_up);
  check_launch(op, launch_grouped_gemm_cuda(product, stream));
  check_launch(op, launch_swiglu_cuda(const_ptr<T>(gate_up), gemm.out, gemm.rows, gemm.b.columns / 2, stream));
}

// Kernels for Hopper may read packed weights. For all others the weights are unpacked first, and with fp8 the rows of a
// are rounded as these weights need it.
template <typename T>
void launch_on_cuda(const char* op, const Tensor& a, const GroupedGemm<T>& gemm, bool swiglu) {
  const CudaScope scope(a);
  const cudaStream_t stream = scope.stream();
  if (launch_if_hopper(op, a, gemm, swiglu, stream)) return;
  if (gemm.b.format == WeightFormat::kPlain) return launch_simple_on_cuda(op, a, gemm, swiglu, stream);

  const Tensor weight = new_tensor(a, {gemm.b.experts, gemm.b.columns, gemm.b.depth});
  check_launch(op, launch_unpack_weight_cuda(gemm.b, mutable_ptr<T>(weight), stream));
  GroupedGemm<T> plain = gemm;
  plain.b.format = WeightFormat::kPlain;
  plain.b.data = weight.const_data_ptr();
  std::optional<Tensor> rounded;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (gemm.b.format == WeightFormat::kFp8) {
      rounded = new_tensor(a, {gemm.rows, gemm.b.depth});
      check_launch(op, launch_round_to_e4m3_cuda(gemm.a, gemm.b.depth, mutable_ptr<T>(*rounded), gemm.rows, stream));
      plain.a = const_ptr<T>(*rounded);
    }
  }
  if (!launch_if_hopper(op, a, plain, swiglu, stream)) launch_simple_on_cuda(op, a, plain, swiglu, stream);
}

template <typename T>
void launch_on_cpu(const GroupedGemm<T>& gemm, bool swiglu) {
  const int64_t columns = swiglu ? gemm.b.columns / 2 : gemm.b.columns;
  if (gemm.rows * columns == 0) return;
  const int64_t blocks = ceil_div(columns, kPanelColumns), threads = torch::stable::get_num_threads();
  GemmWork work(gemm.offs, gemm.b.experts, blocks, threads);
  parallel_rows(threads, gemm.rows * blocks * kPanelColumns * gemm.b.depth / 8 / threads, [&](int64_t, int64_t) {
    swiglu ? launch_grouped_gemm_swiglu_cpu(gemm, work) : launch_grouped_gemm_cpu(gemm, work);
  });
}

// With `swiglu`, out is swiglu of the product.
void multiply(const char* op, const Tensor& a, const Weight& b, const Tensor& offs, const Tensor& out, bool swiglu) {
  const Tensor offs_contiguous = as_contiguous(offs);
  Tensor a_contiguous = as_contiguous(a);
  if (b.view.format == WeightFormat::kFp8 && !a.is_cuda()) a_contiguous = round_to_e4m3(a_contiguous);
  const IndexArray ends = index_array(offs_contiguous);
  if (!a.is_cuda()) internal::check_offsets(op, "a", ends, b.view.experts, a.size(0));
  dispatch_float(op, a.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const GroupedGemm<T> gemm{const_ptr<T>(a_contiguous), b.view, ends, mutable_ptr<T>(out), a.size(0)};
    if constexpr (kWithCuda) {
      if (a.is_cuda()) return launch_on_cuda(op, a, gemm, swiglu);
    }
    launch_on_cpu(gemm, swiglu);
  });
}

}  // namespace

void internal::grouped_gemm(const char* op, const Tensor& a, const Weight& b, const Tensor& offs, const Tensor& out) {
  multiply(op, a, b, offs, out, false);
}

void internal::grouped_gemm_swiglu(const char* op, const Tensor& a, const Weight& b, const Tensor& offs,
                                   const Tensor& out) {
  multiply(op, a, b, offs, out, true);
}

namespace {

// a [M, Kdim], b [E, N, Kdim] plain or packed, offs [E] -> [M, N]
Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& offs) {
  constexpr const char* op = "grouped_gemm";
  check_rank(op, "a", a, 2, "[M, Kdim]");
  check_float(op, "a", a);

  const Weight weight = as_weight(op, "b", b, a.scalar_type(), "[E, N, Kdim]");
  check_weight_shape(op, "b", weight, weight.view.columns, a.size(1));
  check_same_device(op, "b", b, a);

  check_rank(op, "offs", offs, 1, "[E]");
  check_size(op, "offs", offs, 0, b.size(0));
  check_index(op, "offs", offs);
  check_same_device(op, "offs", offs, a);

  const Tensor out = new_tensor(a, {a.size(0), weight.view.columns});
  internal::grouped_gemm(op, a, weight, offs, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }
#endif

}  // namespace mixtral
