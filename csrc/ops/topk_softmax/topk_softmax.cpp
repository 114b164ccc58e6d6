#include "topk_softmax.h"

#include <limits>
#include <optional>
#include <tuple>

#include "../dispatch.h"
#include "../internal_ops.h"

namespace mixtral {

void internal::check_top_k(const char* op, int64_t top_k, int64_t experts) {
  MIXTRAL_CHECK(top_k >= 1 && top_k <= experts, op, ": top_k must be in [1, ", experts, "], got ", top_k);
}

std::optional<Tensor> internal::checked_bias(const char* op, const std::optional<Tensor>& select_bias, int64_t experts,
                                             const Tensor& reference) {
  if (!select_bias) return std::nullopt;
  check_rank(op, "select_bias", *select_bias, 1, "[E]");
  check_size(op, "select_bias", *select_bias, 0, experts);
  check_dtype(op, "select_bias", *select_bias, ScalarType::Float);
  check_same_device(op, "select_bias", *select_bias, reference);
  return as_contiguous(*select_bias);
}

Tensor internal::topk_softmax_backward(const char* op, const Tensor& grad, const Tensor& logits, const Tensor& weights,
                                       const Tensor& topk_ids, bool renormalize) {
  const int64_t tokens = logits.size(0), experts = logits.size(1), top_k = topk_ids.size(1);
  const Tensor grad_contiguous = as_contiguous(grad), weights_contiguous = as_contiguous(weights);
  const Tensor logits_contiguous = as_contiguous(logits), ids_contiguous = as_contiguous(topk_ids);
  const Tensor grad_logits = new_tensor(logits, {tokens, experts});
  const IndexArray ids = index_array(ids_contiguous);
  const float *grad_ptr = const_ptr<float>(grad_contiguous), *weights_ptr = const_ptr<float>(weights_contiguous);
  dispatch_float(op, logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* logits_ptr = const_ptr<T>(logits_contiguous);
    T* grad_logits_ptr = mutable_ptr<T>(grad_logits);
    if constexpr (kWithCuda) {
      if (logits.is_cuda()) {
        const CudaScope scope(logits);
        check_launch(op, launch_topk_softmax_backward_cuda(grad_ptr, logits_ptr, weights_ptr, ids, grad_logits_ptr,
                                                           tokens, experts, top_k, renormalize, scope.stream()));
        return;
      }
    }
    for (int64_t i = 0; i < tokens * top_k; ++i)
      MIXTRAL_CHECK(ids[i] >= 0 && ids[i] < experts, op, ": topk_ids must be in [0, ", experts, "), got ", ids[i],
                    " at token ", i / top_k);
    parallel_rows(tokens, 4 * experts, [=](int64_t begin, int64_t end) {
      launch_topk_softmax_backward_cpu(grad_ptr, logits_ptr, weights_ptr, ids, grad_logits_ptr, experts, top_k,
                                       renormalize, begin, end);
    });
  });
  return grad_logits;
}

void internal::check_choice(const char* op, const Tensor& grad, const Tensor& weights, const Tensor& topk_ids,
                            const Tensor& first) {
  check_rank(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_index(op, "topk_ids", topk_ids);
  check_size(op, "topk_ids", topk_ids, 0, first.size(0));
  check_same_device(op, "topk_ids", topk_ids, first);
  const std::pair<const char*, const Tensor*> floats[] = {{"grad", &grad}, {"topk_weights", &weights}};
  for (const auto& [name, tensor] : floats) {
    check_rank(op, name, *tensor, 2, "[T, K]");
    check_dtype(op, name, *tensor, ScalarType::Float);
    check_size(op, name, *tensor, 0, topk_ids.size(0));
    check_size(op, name, *tensor, 1, topk_ids.size(1));
    check_same_device(op, name, *tensor, first);
  }
}

namespace {

void check_logits(const char* op, const Tensor& router_logits) {
  check_rank(op, "router_logits", router_logits, 2, "[T, E]");
  check_float(op, "router_logits", router_logits);
  MIXTRAL_CHECK(router_logits.size(1) <= std::numeric_limits<int32_t>::max(), op,
                ": router_logits must have at most 2^31 - 1 experts, got ", router_logits.size(1));
}

// router_logits [T, E] -> weights [T, K], ids [T, K]
std::tuple<Tensor, Tensor> topk_softmax(const Tensor& router_logits, int64_t top_k, bool renormalize,
                                        const std::optional<Tensor>& select_bias) {
  constexpr const char* op = "topk_softmax";
  check_logits(op, router_logits);
  const int64_t tokens = router_logits.size(0), experts = router_logits.size(1);
  internal::check_top_k(op, top_k, experts);
  const std::optional<Tensor> bias = internal::checked_bias(op, select_bias, experts, router_logits);
  const float* bias_ptr = bias ? const_ptr<float>(*bias) : nullptr;
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
        check_launch(op, launch_topk_softmax_cuda(logits_ptr, bias_ptr, weights_ptr, ids_ptr, tokens, experts, top_k,
                                                  renormalize, scope.stream()));
        return;
      }
    }
    parallel_rows(tokens, experts * (top_k + 8), [=](int64_t begin, int64_t end) {
      launch_topk_softmax_cpu(logits_ptr, bias_ptr, weights_ptr, ids_ptr, experts, top_k, renormalize, begin, end);
    });
  });
  return {weights, ids};
}

// grad [T, K], router_logits [T, E], topk_weights [T, K], topk_ids [T, K] -> [T, E]
Tensor topk_softmax_backward(const Tensor& grad, const Tensor& router_logits, const Tensor& topk_weights,
                             const Tensor& topk_ids, bool renormalize) {
  constexpr const char* op = "topk_softmax_backward";
  check_logits(op, router_logits);
  internal::check_choice(op, grad, topk_weights, topk_ids, router_logits);
  return internal::topk_softmax_backward(op, grad, router_logits, topk_weights, topk_ids, renormalize);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("topk_softmax", TORCH_BOX(&topk_softmax));
  m.impl("topk_softmax_backward", TORCH_BOX(&topk_softmax_backward));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("topk_softmax", TORCH_BOX(&topk_softmax));
  m.impl("topk_softmax_backward", TORCH_BOX(&topk_softmax_backward));
}
#endif

}  // namespace mixtral
