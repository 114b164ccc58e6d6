#include "moe_route.h"

#include <tuple>

#include "../dispatch.h"
#include "../steps.h"

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

std::tuple<Tensor, Tensor> route_cuda(const Tensor& x, const Tensor& router, int64_t top_k, bool renormalize) {
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = router.size(0);
  MIXTRAL_CHECK(experts <= kMaxRoutedExpertsCuda, op, ": router must have at most ", kMaxRoutedExpertsCuda,
                " experts on cuda, got ", experts);
  const Tensor x_contiguous = torch::stable::contiguous(x), router_contiguous = torch::stable::contiguous(router);
  const Tensor weights = torch::stable::new_empty(x, {tokens, top_k}, ScalarType::Float);
  const Tensor ids = torch::stable::new_empty(x, {tokens, top_k}, ScalarType::Int);
  dispatch_float(op, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const CudaScope scope(x);
    const auto launch = [&](auto router_tag) {
      using R = decltype(router_tag);
      if constexpr (kWithCuda)
        check_launch(op, launch_moe_route_cuda(const_ptr<T>(x_contiguous), const_ptr<R>(router_contiguous),
                                               mutable_ptr<float>(weights), mutable_ptr<int32_t>(ids), tokens, hidden,
                                               experts, top_k, renormalize, scope.stream()));
    };
    router.scalar_type() == ScalarType::Float ? launch(float{}) : launch(T{});
  });
  return {weights, ids};
}

// x [T, H], router [E, H] -> weights [T, K], ids [T, K]
std::tuple<Tensor, Tensor> moe_route(const Tensor& x, const Tensor& router, int64_t top_k, bool renormalize) {
  check_arguments(x, router, top_k);
  if constexpr (kWithCuda) {
    if (x.is_cuda()) return route_cuda(x, router, top_k, renormalize);
  }
  const Tensor rows = torch::stable::to(x, router.scalar_type());
  const Tensor offs = torch::stable::full({1}, static_cast<double>(x.size(0)), ScalarType::Long);
  const Tensor logits = grouped_gemm_step(op, "router", rows, torch::stable::unsqueeze(router, 0), offs);  // [T, E]
  return topk_softmax_step(op, logits, top_k, renormalize);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) { m.impl("moe_route", TORCH_BOX(&moe_route)); }

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) { m.impl("moe_route", TORCH_BOX(&moe_route)); }
#endif

}  // namespace mixtral
