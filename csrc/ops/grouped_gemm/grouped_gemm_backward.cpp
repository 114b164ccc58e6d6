#include "../dispatch.h"
#include "../internal_ops.h"
#include "../weight_gradient.h"
#include "gemm_work.h"
#include "grouped_gemm.h"

namespace mixtral {
namespace {

// Runs `share` on every thread, for work of so many products.
template <typename Share>
void share_work(int64_t threads, int64_t products, const Share& share) {
  parallel_rows(threads, products / 8 / threads, [&](int64_t, int64_t) { share(); });
}

// The gradient of a is the product of grad with b, read the other way.
template <typename T>
void launch_input_on_cpu(const GroupedGemm<T>& gemm) {
  if (gemm.rows * gemm.b.columns == 0) return;
  const int64_t blocks = ceil_div(gemm.b.columns, kPanelColumns), threads = torch::stable::get_num_threads();
  GemmWork work(gemm.offs, gemm.b.experts, blocks, threads);
  share_work(threads, gemm.rows * gemm.b.columns * gemm.b.depth, [&] { launch_grouped_gemm_cpu(gemm, work); });
}

template <typename T>
void launch_weight_on_cpu(const GroupedGemmWeightGradient<T>& gradient) {
  const auto& [grad, a, offs, out, rows, experts, columns, depth] = gradient;
  if (experts * columns * depth == 0) return;
  const int64_t blocks = ceil_div(depth, kPanelColumns), threads = torch::stable::get_num_threads();
  GemmWork work = GemmWork::of_depths(offs, experts, columns, blocks, threads);
  share_work(threads, (rows + experts) * columns * depth,
             [&] { launch_grouped_gemm_backward_weight_cpu(gradient, work); });
}

}  // namespace

void internal::grouped_gemm_backward_input(const char* op, const Tensor& grad, const Weight& b, const Tensor& offs,
                                           const Tensor& out) {
  const bool plain = b.view.format == WeightFormat::kPlain;
  const Tensor weight = plain ? b.tensor : unpack_weight(op, b, grad.scalar_type());
  const Tensor grad_contiguous = as_contiguous(grad), offs_contiguous = as_contiguous(offs);
  const IndexArray ends = index_array(offs_contiguous);
  if (!grad.is_cuda()) check_offsets(op, "grad", ends, b.view.experts, grad.size(0));
  const WeightView view{WeightFormat::kTransposed, weight.const_data_ptr(), b.view.experts, b.view.depth,
                        b.view.columns};
  dispatch_float(op, grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const GroupedGemm<T> gemm{const_ptr<T>(grad_contiguous), view, ends, mutable_ptr<T>(out), grad.size(0)};
    if constexpr (kWithCuda) {
      if (grad.is_cuda()) {
        const CudaScope scope(grad);
        return check_launch(op, launch_grouped_gemm_backward_input_cuda(gemm, scope.stream()));
      }
    }
    launch_input_on_cpu(gemm);
  });
}

void internal::grouped_gemm_backward_weight(const char* op, const Tensor& grad, const Tensor& a, const Tensor& offs,
                                            const Tensor& out) {
  const Tensor grad_contiguous = as_contiguous(grad), a_contiguous = as_contiguous(a);
  const Tensor offs_contiguous = as_contiguous(offs);
  const IndexArray ends = index_array(offs_contiguous);
  if (!grad.is_cuda()) check_offsets(op, "grad", ends, offs.size(0), grad.size(0));
  dispatch_float(op, grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const GroupedGemmWeightGradient<T> gradient{const_ptr<T>(grad_contiguous),
                                                const_ptr<T>(a_contiguous),
                                                ends,
                                                mutable_ptr<T>(out),
                                                grad.size(0),
                                                offs.size(0),
                                                grad.size(1),
                                                a.size(1)};
    if constexpr (kWithCuda) {
      if (grad.is_cuda()) {
        const CudaScope scope(grad);
        return check_launch(op, launch_grouped_gemm_backward_weight_cuda(gradient, scope.stream()));
      }
    }
    launch_weight_on_cpu(gradient);
  });
}

namespace {

void check_grad(const char* op, const Tensor& grad) {
  check_rank(op, "grad", grad, 2, "[M, N]");
  check_float(op, "grad", grad);
}

void check_offs(const char* op, const Tensor& offs, const Tensor& grad) {
  check_rank(op, "offs", offs, 1, "[E]");
  check_index(op, "offs", offs);
  check_same_device(op, "offs", offs, grad);
}

// grad [M, N], b [E, N, Kdim] plain or packed, offs [E] -> [M, Kdim]
Tensor grouped_gemm_backward_input(const Tensor& grad, const Tensor& b, const Tensor& offs) {
  constexpr const char* op = "grouped_gemm_backward_input";
  check_grad(op, grad);
  const Weight weight = as_weight(op, "b", b, grad.scalar_type(), "[E, N, Kdim]");
  check_weight_shape(op, "b", weight, grad.size(1), weight.view.depth);
  check_same_device(op, "b", b, grad);
  check_offs(op, offs, grad);
  check_size(op, "offs", offs, 0, b.size(0));

  const Tensor out = new_tensor(grad, {grad.size(0), weight.view.depth});
  internal::grouped_gemm_backward_input(op, grad, weight, offs, out);
  return out;
}

// grad [M, N], a [M, Kdim], offs [E] -> [E, N, Kdim]
Tensor grouped_gemm_backward_weight(const Tensor& grad, const Tensor& a, const Tensor& offs) {
  constexpr const char* op = "grouped_gemm_backward_weight";
  check_grad(op, grad);
  check_rank(op, "a", a, 2, "[M, Kdim]");
  check_dtype(op, "a", a, grad.scalar_type());
  check_size(op, "a", a, 0, grad.size(0));
  check_same_device(op, "a", a, grad);
  check_offs(op, offs, grad);

  const Tensor out = new_weight_gradient(grad, offs.size(0), grad.size(1), a.size(1));
  internal::grouped_gemm_backward_weight(op, grad, a, offs, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("grouped_gemm_backward_input", TORCH_BOX(&grouped_gemm_backward_input));
  m.impl("grouped_gemm_backward_weight", TORCH_BOX(&grouped_gemm_backward_weight));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("grouped_gemm_backward_input", TORCH_BOX(&grouped_gemm_backward_input));
  m.impl("grouped_gemm_backward_weight", TORCH_BOX(&grouped_gemm_backward_weight));
}
#endif

}  // namespace mixtral
