#include "swiglu.h"

#include "../dispatch.h"
#include "../internal_ops.h"
#include "swiglu_backward.h"

namespace mixtral {
namespace {

void check_gate_up(const char* op, const Tensor& gate_up) {
  check_rank(op, "gate_up", gate_up, 2, "[M, 2I]");
  check_float(op, "gate_up", gate_up);
  MIXTRAL_CHECK(gate_up.size(1) % 2 == 0, op, ": gate_up must have an even size in dimension 1, got shape ",
                shape_string(gate_up));
}

}  // namespace

void internal::swiglu(const char* op, const Tensor& gate_up, const Tensor& out) {
  const int64_t rows = gate_up.size(0), intermediate = gate_up.size(1) / 2;
  const Tensor gate_up_contiguous = as_contiguous(gate_up);
  dispatch_float(op, gate_up.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* gate_up_ptr = const_ptr<T>(gate_up_contiguous);
    T* out_ptr = mutable_ptr<T>(out);
    if constexpr (kWithCuda) {
      if (gate_up.is_cuda()) {
        const CudaScope scope(gate_up);
        check_launch(op, launch_swiglu_cuda(gate_up_ptr, out_ptr, rows, intermediate, scope.stream()));
        return;
      }
    }
    parallel_rows(rows, intermediate * 8, [=](int64_t begin, int64_t end) {
      launch_swiglu_cpu(gate_up_ptr, out_ptr, intermediate, begin, end);
    });
  });
}

namespace {

// gate_up [M, 2I] -> [M, I]
Tensor swiglu(const Tensor& gate_up) {
  constexpr const char* op = "swiglu";
  check_gate_up(op, gate_up);
  const Tensor out = new_tensor(gate_up, {gate_up.size(0), gate_up.size(1) / 2});
  internal::swiglu(op, gate_up, out);
  return out;
}

// grad [M, I], gate_up [M, 2I] -> [M, 2I]
Tensor swiglu_backward(const Tensor& grad, const Tensor& gate_up) {
  constexpr const char* op = "swiglu_backward";
  check_gate_up(op, gate_up);
  const int64_t rows = gate_up.size(0), intermediate = gate_up.size(1) / 2;
  check_rank(op, "grad", grad, 2, "[M, I]");
  check_size(op, "grad", grad, 0, rows);
  check_size(op, "grad", grad, 1, intermediate);
  check_dtype(op, "grad", grad, gate_up.scalar_type());
  check_same_device(op, "grad", grad, gate_up);
  const Tensor grad_contiguous = as_contiguous(grad), gate_up_contiguous = as_contiguous(gate_up);
  const Tensor out = new_tensor(gate_up, gate_up.sizes());
  dispatch_float(op, gate_up.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T *grad_ptr = const_ptr<T>(grad_contiguous), *gate_up_ptr = const_ptr<T>(gate_up_contiguous);
    T* out_ptr = mutable_ptr<T>(out);
    if constexpr (kWithCuda) {
      if (gate_up.is_cuda()) {
        const CudaScope scope(gate_up);
        check_launch(op,
                     launch_swiglu_backward_cuda(grad_ptr, gate_up_ptr, out_ptr, rows, intermediate, scope.stream()));
        return;
      }
    }
    parallel_rows(rows, intermediate * 12, [=](int64_t begin, int64_t end) {
      launch_swiglu_backward_cpu(grad_ptr, gate_up_ptr, out_ptr, intermediate, begin, end);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}
#endif

}  // namespace mixtral
