#include "sliding_window_attention_backward.h"

#include <tuple>

#include "../cpu/shared_work.h"
#include "../dispatch.h"
#include "../product_order.h"
#include "attend.h"

namespace mixtral {
namespace {

std::tuple<Tensor, Tensor> sliding_window_attention_for_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                                 const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                                 int64_t window, bool causal,
                                                                 std::optional<double> scale) {
  constexpr const char* kOp = "sliding_window_attention_for_backward";
  const PackedSequences packed = packed_sequences(kOp, q, k, v, cu_seqlens_q, cu_seqlens_k, window, causal);
  const Tensor lse = new_tensor(q, {q.size(1), q.size(0)}, ScalarType::Float);
  const Tensor out =
      attend(kOp, q, as_contiguous(k), as_contiguous(v), packed.cu_seqlens_q, packed.keys, window, causal, scale, &lse);
  return {out, lse};
}

// `t` must have the shape, dtype and device of q.
void check_like_q(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_rank(op, name, t, 3, "[Tq, Nq, D]");
  for (int64_t d = 0; d < 3; ++d) check_size(op, name, t, d, q.size(d));
  check_dtype(op, name, t, q.scalar_type());
  check_same_device(op, name, t, q);
}

std::tuple<Tensor, Tensor, Tensor> sliding_window_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t window, bool causal, std::optional<double> scale) {
  constexpr const char* kOp = "sliding_window_attention_backward";
  const PackedSequences packed = packed_sequences(kOp, q, k, v, cu_seqlens_q, cu_seqlens_k, window, causal);
  check_like_q(kOp, "grad", grad, q);
  check_like_q(kOp, "out", out, q);
  check_rank(kOp, "lse", lse, 2, "[Nq, Tq]");
  check_size(kOp, "lse", lse, 0, q.size(1));
  check_size(kOp, "lse", lse, 1, q.size(0));
  check_dtype(kOp, "lse", lse, ScalarType::Float);
  check_same_device(kOp, "lse", lse, q);
  const Tensor inputs[] = {as_contiguous(q),    as_contiguous(k),   as_contiguous(v),
                           as_contiguous(grad), as_contiguous(out), as_contiguous(lse)};
  const Tensor grad_q = new_tensor(q, q.sizes()), grad_k = new_tensor(k, k.sizes()), grad_v = new_tensor(v, v.sizes());
  const int64_t head_dim = q.size(2);
  dispatch_float(kOp, q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    AttentionBackwardProblem<T> problem{
        {const_ptr<T>(inputs[0]), const_ptr<T>(inputs[1]), const_ptr<T>(inputs[2]), nullptr,
         const_ptr<int64_t>(packed.cu_seqlens_q), packed.keys, q.size(0), packed.cu_seqlens_q.size(0) - 1, q.size(1),
         k.size(1), head_dim, window, causal, score_scale(scale, head_dim)},
        const_ptr<T>(inputs[3]),
        const_ptr<T>(inputs[4]),
        const_ptr<float>(inputs[5]),
        mutable_ptr<T>(grad_q),
        mutable_ptr<T>(grad_k),
        mutable_ptr<T>(grad_v)};
    if constexpr (kWithCuda) {
      if (q.is_cuda()) {
        MIXTRAL_CHECK(head_dim <= kMaxHeadDimCuda, kOp, ": q must have a head dim of at most ", kMaxHeadDimCuda,
                      " on CUDA, got shape ", shape_string(q));
        const Tensor delta = new_tensor(q, {q.size(1), q.size(0)}, ScalarType::Float);
        problem.delta = mutable_ptr<float>(delta);
        const CudaScope scope(q);
        check_launch(kOp, launch_attention_backward_cuda(problem, scope.stream()));
        return;
      }
    }
    const Tensor sums = new_tensor(q, {2, k.size(1), k.size(0), round_up(head_dim, kPanelColumns)}, ScalarType::Float);
    problem.sum_k = mutable_ptr<float>(sums);
    problem.sum_v = problem.sum_k + sums.numel() / 2;
    cpu::SharedWork items = cpu::SharedWork::of_items(problem.num_items());
    parallel_rows(problem.num_items(), head_dim * 512,
                  [&](int64_t, int64_t) { launch_attention_backward_cpu(problem, items); });
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("sliding_window_attention_for_backward", TORCH_BOX(&sliding_window_attention_for_backward));
  m.impl("sliding_window_attention_backward", TORCH_BOX(&sliding_window_attention_backward));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("sliding_window_attention_for_backward", TORCH_BOX(&sliding_window_attention_for_backward));
  m.impl("sliding_window_attention_backward", TORCH_BOX(&sliding_window_attention_backward));
}
#endif

}  // namespace mixtral
