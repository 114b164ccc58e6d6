#include "../../cuda/kernel_choice.h"
#include "../../dispatch.h"
#include "../../grouped_gemm/hopper/grouped_gemm_hopper.h"
#include "../../grouped_gemm/hopper/grouped_gemm_stream_hopper.h"
#include "../../internal_ops.h"
#include "../moe_mlp.h"

namespace mixtral {

bool takes_moe_mlp_hopper(const Tensor& x, const Tensor& topk_ids, const Weight& gate_up, const Weight& down) {
  if (!x.is_cuda() || x.scalar_type() != ScalarType::BFloat16 || topk_ids.numel() == 0) return false;
  const GroupedGemm<BFloat16> first{const_ptr<BFloat16>(x), gate_up.view, {}, nullptr, x.size(0)};
  const GroupedGemm<BFloat16> second{nullptr, down.view, {}, nullptr, topk_ids.numel()};
  return takes_routed_gemm_stream_hopper(first, topk_ids.size(1), /*swiglu=*/true) &&
         takes_routed_gemm_stream_hopper(second, 1, /*swiglu=*/false) && use_hopper_kernels(x);
}

Tensor moe_mlp_hopper(const char* op, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                      const Weight& gate_up, const Weight& down) {
  // The second product reads ids and down without waiting for the first one, which has waited for ids before it lets
  // another kernel start (grouped_gemm_stream_routing_hopper.cuh). So copies of strided ones come first: that of ids
  // here, that of down where the arguments are checked.
  const Tensor ids = as_contiguous(topk_ids);
  const Tensor activated = grouped_gemm_routed_hopper(op, x, gate_up, ids, /*ids_ready=*/false, /*swiglu=*/true);
  const Tensor y = grouped_gemm_routed_hopper(op, activated, down, ids, /*ids_ready=*/true, /*swiglu=*/false);
  return internal::moe_combine(op, y, topk_weights, ids, gate_up.view.experts);
}

}  // namespace mixtral
