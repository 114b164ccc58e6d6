#include "../cuda/kernel_choice.h"
#include "../dispatch.h"
#include "../grouped_gemm/hopper/grouped_gemm_stream_hopper.h"
#include "../pack_weight/weight_view.h"
#include "moe_mlp.h"

namespace mixtral {

bool takes_moe_mlp_hopper(const char* op, const Tensor& x, const Tensor& topk_ids, const Tensor& gate_up_proj,
                          const Tensor& down_proj) {
  if (!x.is_cuda() || x.scalar_type() != ScalarType::BFloat16 || topk_ids.numel() == 0) return false;
  if (!down_proj.is_contiguous()) return false;  // the second product reads it before a copy of it would be ready
  const WeightView gate_up = view_weight(op, "gate_up_proj", gate_up_proj, x.scalar_type(), "[E, 2I, H]");
  const WeightView down = view_weight(op, "down_proj", down_proj, x.scalar_type(), "[E, H, I]");
  const GroupedGemm<BFloat16> first{const_ptr<BFloat16>(x), gate_up, {}, nullptr, x.size(0)};
  const GroupedGemm<BFloat16> second{nullptr, down, {}, nullptr, topk_ids.numel()};
  return takes_routed_gemm_stream_hopper(first, topk_ids.size(1), /*swiglu=*/true) &&
         takes_routed_gemm_stream_hopper(second, 1, /*swiglu=*/false) && use_hopper_kernels(x);
}

Tensor moe_mlp_hopper(const char* op, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                      const Tensor& gate_up_proj, const Tensor& down_proj) {
  // A copy, if at all, before the first product waits: the second one reads ids without waiting.
  const Tensor ids = as_contiguous(topk_ids);
  const Tensor activated = grouped_gemm_routed_step(op, "gate_up_proj", x, gate_up_proj, ids, /*ids_ready=*/false,
                                                    /*swiglu=*/true);  // [T K, I]
  const Tensor y = grouped_gemm_routed_step(op, "down_proj", activated, down_proj, ids, /*ids_ready=*/true,
                                            /*swiglu=*/false);  // [T K, H]
  return moe_combine_step(op, y, topk_weights, ids, gate_up_proj.size(0));
}

}  // namespace mixtral
