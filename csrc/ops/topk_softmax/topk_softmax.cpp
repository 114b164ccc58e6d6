#include "topk_softmax.h"

#include <limits>
#include <tuple>

#include "../dispatch.h"

namespace mixtral {
namespace {

// router_logits [T, E] -> weights [T, K], ids [T, K]
std::tuple<Tensor, Tensor> topk_softmax(const Tensor& router_logits, int64_t top_k, bool renormalize) {
  constexpr const char* op = "topk_softmax";
  check_rank(op, "router_logits", router_logits, 2, "[T, E]");
  check_float(op, "router_logits", router_logits);
  const int64_t tokens = router_logits.size(0), experts = router_logits.size(1);
  MIXTRAL_CHECK(top_k >= 1 && top_k <= experts, op, ": top_k must be in [1, ", experts, "], got ", top_k);
  MIXTRAL_CHECK(experts <= std::numeric_limits<int32_t>::max(), op, ": router_logits must have at most 2^31 - 1 ",
                "experts, got ", experts);
  const Tensor logits = as_contiguous(router_logits);
  const Tensor weights = new_tensor(logits, {tokens, top_k}, ScalarType::Float);
  const Tensor ids = new_tensor(logits, {tokens, top_k}, ScalarType::Int);
  float* weights_ptr = mutable_ptr<float>(weights);
  int32_t* ids_ptr = mutable_ptr<int32_t>(ids);
  dispatch_float(op, logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* logits_ptr = const_ptr<T>(logits);
    if constexpr (kWithCuda) {
      if (logits.is_cuda()) {
        const CudaScope scope(logits);
        check_launch(op, launch_topk_softmax_cuda(logits_ptr, weights_ptr, ids_ptr, tokens, experts, top_k, renormalize,
                                                  scope.stream()));
        return;
      }
    }
    parallel_rows(tokens, experts * (top_k + 8), [=](int64_t begin, int64_t end) {
      launch_topk_softmax_cpu(logits_ptr, weights_ptr, ids_ptr, experts, top_k, renormalize, begin, end);
    });
  });
  return {weights, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) { m.impl("topk_softmax", TORCH_BOX(&topk_softmax)); }

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) { m.impl("topk_softmax", TORCH_BOX(&topk_softmax)); }
#endif

}  // namespace mixtral
