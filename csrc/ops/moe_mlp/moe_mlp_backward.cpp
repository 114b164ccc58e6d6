#include "moe_mlp_backward.h"

#include <optional>
#include <tuple>

#include "../dispatch.h"
#include "../internal_ops.h"
#include "../weight_gradient.h"
#include "moe_mlp.h"

namespace mixtral {
namespace {

// x [T, H], topk_weights [T, K], topk_ids [T, K], gate_up_proj [E, 2I, H] and down_proj [E, H, I], each plain or packed
// -> out [T, H], gate_up [M, 2I], and activated [M, I] if it is to be kept, else [0, I]
std::tuple<Tensor, Tensor, Tensor> moe_mlp_for_backward(const Tensor& x, const Tensor& topk_weights,
                                                        const Tensor& topk_ids, const Tensor& gate_up_proj,
                                                        const Tensor& down_proj, bool keep_activated) {
  constexpr const char* op = "moe_mlp_for_backward";
  const auto [gate_up, down] = check_moe_arguments(op, x, topk_weights, topk_ids, gate_up_proj, down_proj);
  const int64_t copies = topk_ids.numel(), intermediate = down.view.depth;
  const Tensor all_rows = new_tensor(x, {copies, x.size(1)});
  const internal::PermutationIndex index = internal::moe_permute(op, x, topk_ids, gate_up.view.experts, all_rows);
  const Tensor product = new_tensor(x, {copies, 2 * intermediate}), activated = new_tensor(x, {copies, intermediate});
  const Tensor rows = first_rows(all_rows, index.rows), kept_activated = first_rows(activated, index.rows);
  internal::grouped_gemm(op, rows, gate_up, index.offs, first_rows(product, index.rows));
  internal::swiglu(op, first_rows(product, index.rows), kept_activated);
  internal::grouped_gemm(op, kept_activated, down, index.offs, rows);  // overwrites `rows`, no longer needed
  const Tensor out = internal::moe_unpermute(op, rows, topk_weights, index.row_map);
  return {out, product, keep_activated ? activated : new_tensor(x, {0, intermediate})};
}

struct Wanted {
  bool x, topk_weights, gate_up_proj, down_proj;

  bool gate_up() const { return x || gate_up_proj; }            // grad_z
  bool activated() const { return topk_weights || down_proj; }  // a
  bool product() const { return gate_up() || topk_weights; }    // g
};

struct Gradients {
  Tensor x, topk_weights, gate_up_proj, down_proj;
};

void differentiate_activation(const char* op, const internal::PermutationIndex& index, const Tensor& topk_weights,
                              const Tensor& gate_up, const std::optional<Tensor>& activated, const Tensor& grad,
                              const Tensor& grad_gate_up, const Wanted& want, const Tensor& grad_weights) {
  const Tensor weights = as_contiguous(topk_weights);
  dispatch_float(op, grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const MoeActivationGradient<T> gradient{const_ptr<int32_t>(index.row_map),
                                            const_ptr<float>(weights),
                                            const_ptr<T>(gate_up),
                                            activated ? const_ptr<T>(*activated) : nullptr,
                                            mutable_ptr<T>(grad),
                                            want.gate_up() ? mutable_ptr<T>(grad_gate_up) : nullptr,
                                            want.topk_weights ? mutable_ptr<float>(grad_weights) : nullptr,
                                            want.down_proj,
                                            weights.numel(),
                                            grad.size(1)};
    if constexpr (kWithCuda) {
      if (grad.is_cuda()) {
        const CudaScope scope(grad);
        return check_launch(op, launch_moe_activation_backward_cuda(gradient, scope.stream()));
      }
    }
    parallel_rows(gradient.copies, gradient.intermediate * 16,
                  [&](int64_t begin, int64_t end) { launch_moe_activation_backward_cpu(gradient, begin, end); });
  });
}

// Arguments are checked; those of moe_mlp_for_backward, and what it saved or nothing.
Gradients differentiate(const char* op, const Tensor& grad, const Tensor& x, const Tensor& topk_weights,
                        const Tensor& topk_ids, const MoeWeights& weights, std::optional<Tensor> gate_up,
                        const std::optional<Tensor>& activated, const Wanted& want) {
  const auto& [gate_up_proj, down_proj] = weights;
  const int64_t tokens = x.size(0), top_k = topk_ids.size(1), copies = topk_ids.numel(), hidden = x.size(1);
  const int64_t experts = gate_up_proj.view.experts, intermediate = down_proj.view.depth;
  const Tensor all_rows = new_tensor(x, {copies, hidden});
  const internal::PermutationIndex index = internal::moe_permute(op, grad, topk_ids, experts, all_rows);
  const Tensor rows = first_rows(all_rows, index.rows);  // of grad
  Tensor inputs = new_tensor(x, {want.gate_up_proj || !gate_up ? copies : 0, hidden});
  if (inputs.size(0) > 0) {
    internal::moe_permute(op, x, topk_ids, experts, inputs);
    inputs = first_rows(inputs, index.rows);
  }
  if (!gate_up) {
    gate_up = new_tensor(x, {index.rows, 2 * intermediate});
    internal::grouped_gemm(op, inputs, gate_up_proj, index.offs, *gate_up);
  }

  const Tensor upper = new_tensor(x, {index.rows, intermediate});
  if (want.product()) internal::grouped_gemm_backward_input(op, rows, down_proj, index.offs, upper);
  const Tensor grad_gate_up = new_tensor(x, {want.gate_up() ? index.rows : 0, 2 * intermediate});
  Gradients out{new_tensor(x, {0, hidden}), new_tensor(x, {want.topk_weights ? tokens : 0, top_k}, ScalarType::Float),
                new_weight_gradient(x, want.gate_up_proj ? experts : 0, 2 * intermediate, hidden),
                new_weight_gradient(x, want.down_proj ? experts : 0, hidden, intermediate)};
  differentiate_activation(op, index, topk_weights, *gate_up, activated, upper, grad_gate_up, want, out.topk_weights);
  if (want.down_proj) internal::grouped_gemm_backward_weight(op, rows, upper, index.offs, out.down_proj);
  if (want.gate_up_proj) internal::grouped_gemm_backward_weight(op, grad_gate_up, inputs, index.offs, out.gate_up_proj);
  if (want.x) {
    internal::grouped_gemm_backward_input(op, grad_gate_up, gate_up_proj, index.offs, rows);  // `rows` is free now
    out.x = internal::moe_permute_backward(op, rows, index.row_map);
  }
  return out;
}

// `name` [M, columns] of the rows of moe_mlp_for_backward.
std::optional<Tensor> check_saved(const char* op, const char* name, const std::optional<Tensor>& saved, const Tensor& x,
                                  int64_t copies, int64_t columns) {
  if (!saved) return std::nullopt;
  check_rank(op, name, *saved, 2, "[M, columns]");
  check_dtype(op, name, *saved, x.scalar_type());
  check_size(op, name, *saved, 0, copies);
  check_size(op, name, *saved, 1, columns);
  check_same_device(op, name, *saved, x);
  return as_contiguous(*saved);
}

// grad [T, H], the arguments of moe_mlp, gate_up [M, 2I] and activated [M, I] as saved or none
// -> the gradients of x, topk_weights, gate_up_proj and down_proj; without elements where none is wanted
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(
    const Tensor& grad, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& gate_up_proj,
    const Tensor& down_proj, std::optional<Tensor> gate_up, std::optional<Tensor> activated, bool want_x,
    bool want_topk_weights, bool want_gate_up_proj, bool want_down_proj) {
  constexpr const char* op = "moe_mlp_backward";
  const MoeWeights weights = check_moe_arguments(op, x, topk_weights, topk_ids, gate_up_proj, down_proj);
  check_rank(op, "grad", grad, 2, "[T, H]");
  check_dtype(op, "grad", grad, x.scalar_type());
  check_size(op, "grad", grad, 0, x.size(0));
  check_size(op, "grad", grad, 1, x.size(1));
  check_same_device(op, "grad", grad, x);
  const int64_t copies = topk_ids.numel(), intermediate = weights.down.view.depth;
  const auto product = check_saved(op, "gate_up", gate_up, x, copies, 2 * intermediate);
  const auto kept = check_saved(op, "activated", activated, x, copies, intermediate);
  const Wanted want{want_x, want_topk_weights, want_gate_up_proj, want_down_proj};
  const Gradients out = differentiate(op, grad, x, topk_weights, topk_ids, weights, product, kept, want);
  return {out.x, out.topk_weights, out.gate_up_proj, out.down_proj};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("moe_mlp_for_backward", TORCH_BOX(&moe_mlp_for_backward));
  m.impl("moe_mlp_backward", TORCH_BOX(&moe_mlp_backward));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("moe_mlp_for_backward", TORCH_BOX(&moe_mlp_for_backward));
  m.impl("moe_mlp_backward", TORCH_BOX(&moe_mlp_backward));
}
#endif

}  // namespace mixtral
