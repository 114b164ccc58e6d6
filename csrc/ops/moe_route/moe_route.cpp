#include "moe_route.h"

#include <tuple>

#include "../dispatch.h"
#include "../internal_ops.h"

namespace mixtral {
namespace {

// x [T, H], router [E, H]
void check_arguments(const char* op, const Tensor& x, const Tensor& router) {
  check_rank(op, "x", x, 2, "[T, H]");
  check_float(op, "x", x);
  check_rank(op, "router", router, 2, "[E, H]");
  check_size(op, "router", router, 1, x.size(1));
  MIXTRAL_CHECK(router.scalar_type() == ScalarType::Float || router.scalar_type() == x.scalar_type(), op,
                ": router must be Float or have the dtype of x, ", torch::headeronly::toString(x.scalar_type()),
                ", got ", torch::headeronly::toString(router.scalar_type()));
  check_same_device(op, "router", router, x);
  MIXTRAL_CHECK(!x.is_cuda() || router.size(0) <= kMaxRoutedExpertsCuda, op, ": router must have at most ",
                kMaxRoutedExpertsCuda, " experts on cuda, got ", router.size(0));
}

// Calls f(T{}, R{}) for the dtypes of x and of the router.
template <typename F>
void dispatch_pair(const char* op, const Tensor& x, const Tensor& router, F&& f) {
  dispatch_float(op, x.scalar_type(),
                 [&](auto tag) { router.scalar_type() == ScalarType::Float ? f(tag, float{}) : f(tag, tag); });
}

// The CPU's kernels read the router in f32: one conversion serves all tokens.
Tensor router_rows(const Tensor& router) {
  return as_contiguous(router.is_cuda() ? router : torch::stable::to(router, ScalarType::Float));
}

// Fills out.logits, or else out.weights and out.ids.
void route(const char* op, const Tensor& x, const Tensor& router, const float* select_bias, RouteOutputs out,
           int64_t top_k, bool renormalize) {
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = router.size(0);
  const Tensor x_contiguous = as_contiguous(x), rows = router_rows(router);
  dispatch_pair(op, x, router, [&](auto tag, auto router_tag) {
    using T = decltype(tag);
    using R = decltype(router_tag);
    const T* x_ptr = const_ptr<T>(x_contiguous);
    if constexpr (kWithCuda) {
      if (x.is_cuda()) {
        const CudaScope scope(x);
        check_launch(op, launch_moe_route_cuda(x_ptr, const_ptr<R>(rows), select_bias, out, tokens, hidden, experts,
                                               top_k, renormalize, scope.stream()));
        return;
      }
    }
    const float* router_ptr = const_ptr<float>(rows);
    parallel_rows(tokens, experts * hidden / 8, [=](int64_t begin, int64_t end) {
      if (out.logits)
        launch_router_logits_cpu<T, R>(x_ptr, router_ptr, out.logits, hidden, experts, begin, end);
      else
        launch_moe_route_cpu<T, R>(x_ptr, router_ptr, select_bias, out.weights, out.ids, hidden, experts, top_k,
                                   renormalize, begin, end);
    });
  });
}

// x [T, H], router [E, H] -> weights [T, K], ids [T, K]
std::tuple<Tensor, Tensor> moe_route(const Tensor& x, const Tensor& router, int64_t top_k, bool renormalize,
                                     const std::optional<Tensor>& select_bias) {
  constexpr const char* op = "moe_route";
  check_arguments(op, x, router);
  internal::check_top_k(op, top_k, router.size(0));
  const std::optional<Tensor> bias = internal::checked_bias(op, select_bias, router.size(0), x);
  const Tensor weights = new_tensor(x, {x.size(0), top_k}, ScalarType::Float);
  const Tensor ids = new_tensor(x, {x.size(0), top_k}, ScalarType::Int);
  route(op, x, router, bias ? const_ptr<float>(*bias) : nullptr,
        {nullptr, mutable_ptr<float>(weights), mutable_ptr<int32_t>(ids)}, top_k, renormalize);
  return {weights, ids};
}

Tensor logits_of(const char* op, const Tensor& x, const Tensor& router) {
  const Tensor logits = new_tensor(x, {x.size(0), router.size(0)}, ScalarType::Float);
  if (logits.numel() > 0) route(op, x, router, nullptr, {mutable_ptr<float>(logits), nullptr, nullptr}, 0, false);
  return logits;
}

// x [T, H], router [E, H] -> [T, E]
Tensor router_logits(const Tensor& x, const Tensor& router) {
  constexpr const char* op = "router_logits";
  check_arguments(op, x, router);
  return logits_of(op, x, router);
}

// grad [T, E], x [T, H], router [E, H] -> (grad_x [T, H], grad_router [E, H]), each without elements if not wanted.
std::tuple<Tensor, Tensor> logits_backward(const char* op, const Tensor& grad, const Tensor& x, const Tensor& router,
                                           bool want_x, bool want_router) {
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = router.size(0);
  const Tensor grad_contiguous = as_contiguous(grad), x_contiguous = as_contiguous(x), rows = router_rows(router);
  const Tensor grad_x = new_tensor(x, {want_x ? tokens : 0, hidden});
  const Tensor grad_router = new_tensor(router, {want_router ? experts : 0, hidden});
  const float* grad_ptr = const_ptr<float>(grad_contiguous);
  dispatch_pair(op, x, router, [&](auto tag, auto router_tag) {
    using T = decltype(tag);
    using R = decltype(router_tag);
    const T* x_ptr = const_ptr<T>(x_contiguous);
    T* grad_x_ptr = want_x ? mutable_ptr<T>(grad_x) : nullptr;
    R* grad_router_ptr = want_router ? mutable_ptr<R>(grad_router) : nullptr;
    if constexpr (kWithCuda) {
      if (x.is_cuda()) {
        const CudaScope scope(x);
        check_launch(op, launch_router_logits_backward_cuda(grad_ptr, x_ptr, const_ptr<R>(rows), grad_x_ptr,
                                                            grad_router_ptr, tokens, hidden, experts, scope.stream()));
        return;
      }
    }
    const float* router_ptr = const_ptr<float>(rows);
    parallel_rows(grad_x.size(0), experts * hidden / 8, [=](int64_t begin, int64_t end) {
      launch_router_logits_backward_x_cpu(grad_ptr, router_ptr, grad_x_ptr, hidden, experts, begin, end);
    });
    const int64_t blocks = want_router ? ceil_div(hidden, kGradColumns) : 0;
    parallel_rows(blocks, tokens * experts * kGradColumns / 8, [=](int64_t begin, int64_t end) {
      launch_router_logits_backward_router_cpu(grad_ptr, x_ptr, grad_router_ptr, tokens, hidden, experts, begin, end);
    });
  });
  return {grad_x, grad_router};
}

std::tuple<Tensor, Tensor> router_logits_backward(const Tensor& grad, const Tensor& x, const Tensor& router,
                                                  bool want_x, bool want_router) {
  constexpr const char* op = "router_logits_backward";
  check_arguments(op, x, router);
  check_rank(op, "grad", grad, 2, "[T, E]");
  check_dtype(op, "grad", grad, ScalarType::Float);
  check_size(op, "grad", grad, 0, x.size(0));
  check_size(op, "grad", grad, 1, router.size(0));
  check_same_device(op, "grad", grad, x);
  return logits_backward(op, grad, x, router, want_x, want_router);
}

// grad [T, K], x [T, H], router [E, H], topk_weights [T, K], topk_ids [T, K] -> grad_x [T, H], grad_router [E, H]
std::tuple<Tensor, Tensor> moe_route_backward(const Tensor& grad, const Tensor& x, const Tensor& router,
                                              const Tensor& topk_weights, const Tensor& topk_ids, bool renormalize,
                                              bool want_x, bool want_router) {
  constexpr const char* op = "moe_route_backward";
  check_arguments(op, x, router);
  internal::check_choice(op, grad, topk_weights, topk_ids, x);
  // Renormalised weights have a gradient that does not need the logits: their values are left open.
  const Tensor logits =
      renormalize ? new_tensor(x, {x.size(0), router.size(0)}, ScalarType::Float) : logits_of(op, x, router);
  const Tensor grad_logits = internal::topk_softmax_backward(op, grad, logits, topk_weights, topk_ids, renormalize);
  return logits_backward(op, grad_logits, x, router, want_x, want_router);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
  m.impl("router_logits", TORCH_BOX(&router_logits));
  m.impl("router_logits_backward", TORCH_BOX(&router_logits_backward));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("moe_route", TORCH_BOX(&moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
  m.impl("router_logits", TORCH_BOX(&router_logits));
  m.impl("router_logits_backward", TORCH_BOX(&router_logits_backward));
}
#endif

}  // namespace mixtral
