#include "moe_mlp.h"

#include "../cpu/buffer.h"
#include "../internal_ops.h"
#include "../tensors.h"

namespace mixtral {
namespace {

void check_routing(const char* op, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids) {
  check_rank(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_index(op, "topk_ids", topk_ids);
  check_size(op, "topk_ids", topk_ids, 0, x.size(0));
  check_same_device(op, "topk_ids", topk_ids, x);

  check_rank(op, "topk_weights", topk_weights, 2, "[T, K]");
  check_dtype(op, "topk_weights", topk_weights, ScalarType::Float);
  check_size(op, "topk_weights", topk_weights, 0, x.size(0));
  check_size(op, "topk_weights", topk_weights, 1, topk_ids.size(1));
  check_same_device(op, "topk_weights", topk_weights, x);
}

Weight check_gate_up(const char* op, const Tensor& x, const Tensor& gate_up_proj) {
  const Weight gate_up = as_weight(op, "gate_up_proj", gate_up_proj, x.scalar_type(), "[E, 2I, H]");
  const int64_t columns = gate_up.view.columns;
  check_weight_shape(op, "gate_up_proj", gate_up, columns, x.size(1));
  check_same_device(op, "gate_up_proj", gate_up_proj, x);
  MIXTRAL_CHECK(gate_up.view.experts >= 1, op, ": gate_up_proj must have at least one expert, got shape ",
                shape_string(gate_up_proj));
  MIXTRAL_CHECK(columns % 2 == 0, op, ": gate_up_proj must have an even size in dimension 1, got shape ",
                shape_string(gate_up_proj));
  // A packed block has rows of gate or of up, not of both.
  MIXTRAL_CHECK(gate_up.view.format == WeightFormat::kPlain || columns % (2 * kBlockRows) == 0, op,
                ": gate_up_proj must be packed from an intermediate size that is a multiple of ", kBlockRows, ", got ",
                columns / 2);
  return gate_up;
}

}  // namespace

MoeWeights check_moe_arguments(const char* op, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                               const Tensor& gate_up_proj, const Tensor& down_proj) {
  check_rank(op, "x", x, 2, "[T, H]");
  check_float(op, "x", x);
  check_routing(op, x, topk_weights, topk_ids);
  const Weight gate_up = check_gate_up(op, x, gate_up_proj);
  const Weight down = as_weight(op, "down_proj", down_proj, x.scalar_type(), "[E, H, I]");
  check_size(op, "down_proj", down_proj, 0, gate_up.view.experts);
  check_weight_shape(op, "down_proj", down, x.size(1), gate_up.view.columns / 2);
  check_same_device(op, "down_proj", down_proj, x);
  return {gate_up, down};
}

namespace {

enum Slot { kCopiedRows, kActivatedRows, kSlots };

// [rows, columns] of the dtype of `like`, valid until this thread asks for the slot again. On the CPU the memory is
// kept from call to call: fresh memory from the system costs a page fault every 4 KiB. Above the limit it is not kept,
// since no chunk of a prompt needs that much.
Tensor temporary(Slot slot, const Tensor& like, int64_t rows, int64_t columns) {
  constexpr int64_t kMaxKeptBytes = 128 << 20;  // 2048 tokens of Mixtral 8x7B need 112 MiB
  thread_local cpu::Buffer<char> kept[kSlots];
  const int64_t bytes = rows * columns * like.element_size();
  if (like.is_cuda() || bytes > kMaxKeptBytes) return new_tensor(like, {rows, columns});
  return torch::stable::from_blob(kept[slot].grow(bytes), {rows, columns}, {columns, 1}, like.device(),
                                  like.scalar_type());
}

// x [T, H], topk_weights [T, K], topk_ids [T, K], gate_up_proj [E, 2I, H] and down_proj [E, H, I],
// each plain or packed -> [T, H]
Tensor moe_mlp(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& gate_up_proj,
               const Tensor& down_proj) {
  constexpr const char* op = "moe_mlp";
  const auto [gate_up, down] = check_moe_arguments(op, x, topk_weights, topk_ids, gate_up_proj, down_proj);
#ifdef MIXTRAL_WITH_HOPPER
  if (takes_moe_mlp_hopper(x, topk_ids, gate_up, down))
    return moe_mlp_hopper(op, x, topk_weights, topk_ids, gate_up, down);
#endif
  const int64_t copies = topk_ids.numel();
  const Tensor all_rows = temporary(kCopiedRows, x, copies, x.size(1));
  const internal::PermutationIndex index = internal::moe_permute(op, x, topk_ids, gate_up.view.experts, all_rows);
  const Tensor rows = first_rows(all_rows, index.rows);                                // [M, H]
  const Tensor activated = temporary(kActivatedRows, x, index.rows, down.view.depth);  // [M, I]
  internal::grouped_gemm_swiglu(op, rows, gate_up, index.offs, activated);
  internal::grouped_gemm(op, activated, down, index.offs, rows);  // overwrites `rows`, no longer needed
  return internal::moe_unpermute(op, rows, topk_weights, index.row_map);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) { m.impl("moe_mlp", TORCH_BOX(&moe_mlp)); }

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) { m.impl("moe_mlp", TORCH_BOX(&moe_mlp)); }
#endif

}  // namespace mixtral
