#include "router_losses.h"

#include <optional>
#include <tuple>

#include "../dispatch.h"
#include "../internal_ops.h"

namespace mixtral {
namespace {

// Returns the mask, contiguous.
std::optional<Tensor> check_arguments(const char* op, const Tensor& router_logits, const std::optional<Tensor>& mask) {
  check_rank(op, "router_logits", router_logits, 2, "[T, E]");
  check_float(op, "router_logits", router_logits);
  if (!mask) return std::nullopt;
  check_rank(op, "mask", *mask, 1, "[T]");
  check_dtype(op, "mask", *mask, ScalarType::Bool);
  check_size(op, "mask", *mask, 0, router_logits.size(0));
  check_same_device(op, "mask", *mask, router_logits);
  return as_contiguous(*mask);
}

const bool* mask_ptr(const std::optional<Tensor>& mask) { return mask ? const_ptr<bool>(*mask) : nullptr; }

// router_logits [T, E], topk_ids [T, K], mask [T] -> load [E], prob_sum [E], z_sum [], count []
std::tuple<Tensor, Tensor, Tensor, Tensor> router_losses(const Tensor& router_logits, const Tensor& topk_ids,
                                                         const std::optional<Tensor>& mask) {
  constexpr const char* op = "router_losses";
  const std::optional<Tensor> kept = check_arguments(op, router_logits, mask);
  check_rank(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_index(op, "topk_ids", topk_ids);
  check_size(op, "topk_ids", topk_ids, 0, router_logits.size(0));
  check_same_device(op, "topk_ids", topk_ids, router_logits);
  const int64_t tokens = router_logits.size(0), experts = router_logits.size(1), top_k = topk_ids.size(1);
  const Tensor logits = as_contiguous(router_logits), ids_contiguous = as_contiguous(topk_ids);
  const IndexArray ids = index_array(ids_contiguous);
  const Tensor probabilities = new_tensor(logits, {tokens, experts}, ScalarType::Float);
  const Tensor lse = new_tensor(logits, {tokens}, ScalarType::Float);
  const Tensor load = new_tensor(logits, {experts}, ScalarType::Long), count = new_tensor(logits, {}, ScalarType::Long);
  const Tensor prob_sum = new_tensor(logits, {experts}, ScalarType::Float);
  const Tensor z_sum = new_tensor(logits, {}, ScalarType::Float);
  const RouterSums sums{mutable_ptr<int64_t>(load), mutable_ptr<float>(prob_sum), mutable_ptr<float>(z_sum),
                        mutable_ptr<int64_t>(count)};
  float *probabilities_ptr = mutable_ptr<float>(probabilities), *lse_ptr = mutable_ptr<float>(lse);
  const bool* keep = mask_ptr(kept);
  dispatch_float(op, logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* logits_ptr = const_ptr<T>(logits);
    if constexpr (kWithCuda) {
      if (logits.is_cuda()) {
        const CudaScope scope(logits);
        check_launch(op, launch_router_losses_cuda(logits_ptr, ids, keep, probabilities_ptr, lse_ptr, sums, tokens,
                                                   experts, top_k, scope.stream()));
        return;
      }
    }
    parallel_rows(tokens, 8 * experts, [=](int64_t begin, int64_t end) {
      launch_router_probabilities_cpu(logits_ptr, keep, probabilities_ptr, lse_ptr, experts, begin, end);
    });
    const int64_t bad = launch_router_sums_cpu(probabilities_ptr, lse_ptr, ids, keep, sums, tokens, experts, top_k);
    MIXTRAL_CHECK(bad < 0, op, ": topk_ids must be in [0, ", experts, "), got ", ids[bad], " at token ", bad / top_k);
  });
  return {load, prob_sum, z_sum, count};
}

// grad_prob_sum [E], grad_z_sum [], router_logits [T, E], mask [T] -> [T, E]
Tensor router_losses_backward(const Tensor& grad_prob_sum, const Tensor& grad_z_sum, const Tensor& router_logits,
                              const std::optional<Tensor>& mask) {
  constexpr const char* op = "router_losses_backward";
  const std::optional<Tensor> kept = check_arguments(op, router_logits, mask);
  const int64_t tokens = router_logits.size(0), experts = router_logits.size(1);
  check_rank(op, "grad_prob_sum", grad_prob_sum, 1, "[E]");
  check_dtype(op, "grad_prob_sum", grad_prob_sum, ScalarType::Float);
  check_size(op, "grad_prob_sum", grad_prob_sum, 0, experts);
  check_same_device(op, "grad_prob_sum", grad_prob_sum, router_logits);
  check_rank(op, "grad_z_sum", grad_z_sum, 0, "[]");
  check_dtype(op, "grad_z_sum", grad_z_sum, ScalarType::Float);
  check_same_device(op, "grad_z_sum", grad_z_sum, router_logits);
  const Tensor logits = as_contiguous(router_logits), grad_prob = as_contiguous(grad_prob_sum);
  const Tensor grad_logits = new_tensor(logits, {tokens, experts});
  const float *grad_prob_ptr = const_ptr<float>(grad_prob), *grad_z_ptr = const_ptr<float>(grad_z_sum);
  const bool* keep = mask_ptr(kept);
  dispatch_float(op, logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* logits_ptr = const_ptr<T>(logits);
    T* grad_ptr = mutable_ptr<T>(grad_logits);
    if constexpr (kWithCuda) {
      if (logits.is_cuda()) {
        const CudaScope scope(logits);
        check_launch(op, launch_router_losses_backward_cuda(grad_prob_ptr, grad_z_ptr, logits_ptr, keep, grad_ptr,
                                                            tokens, experts, scope.stream()));
        return;
      }
    }
    parallel_rows(tokens, 8 * experts, [=](int64_t begin, int64_t end) {
      launch_router_losses_backward_cpu(grad_prob_ptr, grad_z_ptr, logits_ptr, keep, grad_ptr, experts, begin, end);
    });
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("router_losses", TORCH_BOX(&router_losses));
  m.impl("router_losses_backward", TORCH_BOX(&router_losses_backward));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("router_losses", TORCH_BOX(&router_losses));
  m.impl("router_losses_backward", TORCH_BOX(&router_losses_backward));
}
#endif

}  // namespace mixtral
