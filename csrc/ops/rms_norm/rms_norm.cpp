#include "rms_norm.h"

#include <tuple>

#include "../dispatch.h"

namespace mixtral {
namespace {

void check_arguments(const char* op, const Tensor& x, const Tensor& weight, double eps) {
  check_rank(op, "x", x, 2, "[T, H]");
  check_float(op, "x", x);
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

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_arguments("rms_norm", x, weight, eps);
  Tensor out = new_tensor(x, x.sizes());
  launch("rms_norm", x, nullptr, weight, eps, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  check_arguments("add_rms_norm", x, weight, eps);
  check_rank("add_rms_norm", "residual", residual, 2, "[T, H]");
  check_size("add_rms_norm", "residual", residual, 0, x.size(0));
  check_size("add_rms_norm", "residual", residual, 1, x.size(1));
  check_dtype("add_rms_norm", "residual", residual, x.scalar_type());
  check_same_device("add_rms_norm", "residual", residual, x);
  Tensor out = new_tensor(x, x.sizes());
  Tensor sum = new_tensor(x, x.sizes());
  launch("add_rms_norm", x, &residual, weight, eps, out, &sum);
  return {out, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
}
#endif

}  // namespace mixtral
