#include "moe_route.h"

#include <tuple>

#include "../dispatch.h"

namespace mixtral {
namespace {

constexpr const char* op = "moe_route";

void check_arguments(const Tensor& x, const Tensor& router, int64_t top_k) {
  check_rank(op, "x", x, 2, "[T, H]");
  check_float(op, "x", x);
  check_rank(op, "router", router, 2, "[E, H]");
  check_size(op, "router", router, 1, x.size(1));
  MIXTRAL_CHECK(router.scalar_type() == ScalarType::Float || router.scalar_type() == x.scalar_type(), op,
                ": router must be Float or have the dtype of x, ", torch::headeronly::toString(x.scalar_type()),
                ", got ", torch::headeronly::toString(router.scalar_type()));
  check_same_device(op, "router", router, x);
  const int64_t experts = router.size(0);
  MIXTRAL_CHECK(top_k >= 1 && top_k <= experts, op, ": top_k must be in [1, ", experts, "], got ", top_k);
}

// x [T, H], router [E, H] -> weights [T, K], ids [T, K]
std::tuple<Tensor, Tensor> moe_route(const Tensor& x, const Tensor& router, int64_t top_k, bool renormalize) {
  check_arguments(x, router, top_k);
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = router.size(0);
  MIXTRAL_CHECK(!x.is_cuda() || experts <= kMaxRoutedExpertsCuda, op, ": router must have at most ",
                kMaxRoutedExpertsCuda, " experts on cuda, got ", experts);
  // The CPU's kernel reads the router in f32: one conversion serves all tokens.
  const Tensor rows = x.is_cuda() ? router : torch::stable::to(router, ScalarType::Float);
  const Tensor x_contiguous = as_contiguous(x), rows_contiguous = as_contiguous(rows);
  const Tensor weights = new_tensor(x, {tokens, top_k}, ScalarType::Float);
  const Tensor ids = new_tensor(x, {tokens, top_k}, ScalarType::Int);
  float* weights_ptr = mutable_ptr<float>(weights);
  int32_t* ids_ptr = mutable_ptr<int32_t>(ids);
  dispatch_float(op, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* x_ptr = const_ptr<T>(x_contiguous);
    const auto launch = [&](auto router_tag) {
      using R = decltype(router_tag);
      if constexpr (kWithCuda) {
        if (x.is_cuda()) {
          const CudaScope scope(x);
          check_launch(op, launch_moe_route_cuda(x_ptr, const_ptr<R>(rows_contiguous), weights_ptr, ids_ptr, tokens,
                                                 hidden, experts, top_k, renormalize, scope.stream()));
          return;
        }
      }
      const float* router_ptr = const_ptr<float>(rows_contiguous);
      parallel_rows(tokens, experts * hidden / 8, [=](int64_t begin, int64_t end) {
        launch_moe_route_cpu<T, R>(x_ptr, router_ptr, weights_ptr, ids_ptr, hidden, experts, top_k, renormalize, begin,
                                   end);
      });
    };
    router.scalar_type() == ScalarType::Float ? launch(float{}) : launch(T{});
  });
  return {weights, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) { m.impl("moe_route", TORCH_BOX(&moe_route)); }

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) { m.impl("moe_route", TORCH_BOX(&moe_route)); }
#endif

}  // namespace mixtral
