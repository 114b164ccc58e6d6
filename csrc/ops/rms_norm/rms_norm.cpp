#include "rms_norm.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "../dispatch.h"
#include "../host_device.h"
#include "rms_norm_backward.h"

namespace mixtral {
namespace {

// `name` is that of the argument x.
void check_arguments(const char* op, const Tensor& x, const Tensor& weight, double eps, const char* name = "x") {
  check_rank(op, name, x, 2, "[T, H]");
  check_float(op, name, x);
  check_rank(op, "weight", weight, 1, "[H]");
  check_size(op, "weight", weight, 0, x.size(1));
  check_dtype(op, "weight", weight, x.scalar_type());
  check_same_device(op, "weight", weight, x);
  MIXTRAL_CHECK(eps >= 0, op, ": eps must be >= 0, got ", eps);
}

// `residual` and `sum` are both given (add_rms_norm) or both null (rms_norm).
void launch(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps,
            const Tensor& out, const Tensor* sum) {
  const int64_t rows = x.size(0), hidden = x.size(1);
  const Tensor x_contiguous = as_contiguous(x);
  const Tensor weight_contiguous = as_contiguous(weight);
  const Tensor residual_contiguous = residual ? as_contiguous(*residual) : x_contiguous;
  dispatch_float(op, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* x_ptr = const_ptr<T>(x_contiguous);
    const T* residual_ptr = residual ? const_ptr<T>(residual_contiguous) : nullptr;
    const T* weight_ptr = const_ptr<T>(weight_contiguous);
    T* out_ptr = mutable_ptr<T>(out);
    T* sum_ptr = sum ? mutable_ptr<T>(*sum) : nullptr;
    if constexpr (kWithCuda) {
      if (x.is_cuda()) {
        const CudaScope scope(x);
        check_launch(op, launch_rms_norm_cuda(x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, rows, hidden,
                                              static_cast<float>(eps), scope.stream()));
        return;
      }
    }
    parallel_rows(rows, hidden, [=](int64_t begin, int64_t end) {
      launch_rms_norm_cpu(x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, hidden, static_cast<float>(eps), begin,
                          end);
    });
  });
}

// A tensor of the shape and dtype of x.
void check_like_x(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_rank(op, name, t, 2, "[T, H]");
  check_size(op, name, t, 0, x.size(0));
  check_size(op, name, t, 1, x.size(1));
  check_dtype(op, name, t, x.scalar_type());
  check_same_device(op, name, t, x);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_arguments("rms_norm", x, weight, eps);
  Tensor out = new_tensor(x, x.sizes());
  launch("rms_norm", x, nullptr, weight, eps, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  check_arguments("add_rms_norm", x, weight, eps);
  check_like_x("add_rms_norm", "residual", residual, x);
  Tensor out = new_tensor(x, x.sizes());
  Tensor sum = new_tensor(x, x.sizes());
  launch("add_rms_norm", x, &residual, weight, eps, out, &sum);
  return {out, sum};
}

// (grad_x [T, H], grad_weight [H]), each without elements if it is not wanted.
std::tuple<Tensor, Tensor> backward(const char* op, const Tensor& grad, const Tensor* grad_sum, const Tensor& x,
                                    const Tensor& weight, double eps, bool want_x, bool want_weight) {
  const int64_t rows = x.size(0), hidden = x.size(1);
  const int64_t blocks = std::max<int64_t>(1, ceil_div(rows, kNormRowBlock));
  const Tensor grad_contiguous = as_contiguous(grad), x_contiguous = as_contiguous(x);
  const Tensor weight_contiguous = as_contiguous(weight);
  const Tensor grad_sum_contiguous = grad_sum ? as_contiguous(*grad_sum) : grad_contiguous;
  Tensor grad_x = new_tensor(x, {want_x ? rows : 0, hidden}), grad_weight = new_tensor(x, {want_weight ? hidden : 0});
  const Tensor block_sums = new_tensor(x, {want_weight ? blocks : 0, hidden}, ScalarType::Float);
  dispatch_float(op, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const RmsNormBackward<T> norm{const_ptr<T>(grad_contiguous),
                                  grad_sum ? const_ptr<T>(grad_sum_contiguous) : nullptr,
                                  const_ptr<T>(x_contiguous),
                                  const_ptr<T>(weight_contiguous),
                                  want_x ? mutable_ptr<T>(grad_x) : nullptr,
                                  want_weight ? mutable_ptr<float>(block_sums) : nullptr,
                                  rows,
                                  hidden,
                                  static_cast<float>(eps)};
    T* grad_weight_ptr = want_weight ? mutable_ptr<T>(grad_weight) : nullptr;
    if constexpr (kWithCuda) {
      if (x.is_cuda()) {
        const CudaScope scope(x);
        const Tensor scales = new_tensor(x, {rows}, ScalarType::Float);
        check_launch(op,
                     launch_rms_norm_backward_cuda(norm, mutable_ptr<float>(scales), grad_weight_ptr, scope.stream()));
        return;
      }
    }
    if (!want_x && !want_weight) return;
    parallel_rows(blocks, kNormRowBlock * hidden * 2,
                  [&](int64_t begin, int64_t end) { launch_rms_norm_backward_cpu(norm, begin, end); });
    if (!want_weight) return;
    parallel_rows(hidden, blocks, [&](int64_t begin, int64_t end) {
      launch_rms_norm_backward_sum_cpu(norm.block_sums, grad_weight_ptr, blocks, hidden, begin, end);
    });
  });
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, double eps,
                                             bool want_x, bool want_weight) {
  constexpr const char* op = "rms_norm_backward";
  check_arguments(op, x, weight, eps);
  check_like_x(op, "grad", grad, x);
  return backward(op, grad, nullptr, x, weight, eps, want_x, want_weight);
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(const Tensor& grad_normed, const std::optional<Tensor>& grad_sum,
                                                 const Tensor& sum, const Tensor& weight, double eps, bool want_x,
                                                 bool want_weight) {
  constexpr const char* op = "add_rms_norm_backward";
  check_arguments(op, sum, weight, eps, "sum");
  check_like_x(op, "grad_normed", grad_normed, sum);
  if (grad_sum) check_like_x(op, "grad_sum", *grad_sum, sum);
  return backward(op, grad_normed, grad_sum ? &*grad_sum : nullptr, sum, weight, eps, want_x, want_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
}
#endif

}  // namespace mixtral
