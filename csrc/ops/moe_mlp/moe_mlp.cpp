#include "moe_mlp.h"

#include "../cpu/buffer.h"
#include "../pack_weight/weight_view.h"
#include "../tensors.h"

namespace mixtral {
namespace {

constexpr const char* op = "moe_mlp";

// Returns I.
int64_t check_arguments(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& gate_up_proj,
                        const Tensor& down_proj) {
  check_rank(op, "x", x, 2, "[T, H]");
  check_float(op, "x", x);
  check_rank(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_index(op, "topk_ids", topk_ids);
  check_size(op, "topk_ids", topk_ids, 0, x.size(0));
  check_same_device(op, "topk_ids", topk_ids, x);
  check_rank(op, "topk_weights", topk_weights, 2, "[T, K]");
  check_dtype(op, "topk_weights", topk_weights, ScalarType::Float);
  check_size(op, "topk_weights", topk_weights, 0, x.size(0));
  check_size(op, "topk_weights", topk_weights, 1, topk_ids.size(1));
  check_same_device(op, "topk_weights", topk_weights, x);
  const WeightView gate_up = view_weight(op, "gate_up_proj", gate_up_proj, x.scalar_type(), "[E, 2I, H]");
  check_weight_shape(op, "gate_up_proj", gate_up_proj, gate_up, gate_up.columns, x.size(1));
  check_same_device(op, "gate_up_proj", gate_up_proj, x);
  MIXTRAL_CHECK(gate_up.experts >= 1, op, ": gate_up_proj must have at least one expert, got shape ",
                shape_string(gate_up_proj));
  MIXTRAL_CHECK(gate_up.columns % 2 == 0, op, ": gate_up_proj must have an even size in dimension 1, got shape ",
                shape_string(gate_up_proj));
  MIXTRAL_CHECK(gate_up.format == WeightFormat::kPlain || gate_up.columns % (2 * kBlockRows) == 0, op,
                ": gate_up_proj must be packed from an intermediate size that is a multiple of ", kBlockRows, ", got ",
                gate_up.columns / 2);
  const WeightView down = view_weight(op, "down_proj", down_proj, x.scalar_type(), "[E, H, I]");
  check_size(op, "down_proj", down_proj, 0, gate_up.experts);
  check_weight_shape(op, "down_proj", down_proj, down, x.size(1), gate_up.columns / 2);
  check_same_device(op, "down_proj", down_proj, x);
  return gate_up.columns / 2;
}

enum Slot { kCopiedRows, kActivatedRows, kSlots };

// [rows, columns] of the dtype of `like`, until this thread asks for the slot again. On the CPU the memory is kept from
// call to call: a large block that comes fresh from the system costs a page fault every 4 KiB. What is larger than any
// chunk of a prompt needs is not worth keeping.
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
  const int64_t intermediate = check_arguments(x, topk_weights, topk_ids, gate_up_proj, down_proj);
#ifdef MIXTRAL_WITH_HOPPER
  if (takes_moe_mlp_hopper(op, x, topk_ids, gate_up_proj, down_proj))
    return moe_mlp_hopper(op, x, topk_weights, topk_ids, gate_up_proj, down_proj);
#endif
  const int64_t copies = topk_ids.numel();
  const Tensor rows = temporary(kCopiedRows, x, copies, x.size(1));             // [M, H]
  const Tensor activated = temporary(kActivatedRows, x, copies, intermediate);  // [M, I]
  const PermutationIndex index = moe_permute_step(op, x, topk_ids, gate_up_proj.size(0), rows);
  grouped_gemm_swiglu_step(op, "gate_up_proj", rows, gate_up_proj, index.offs, activated);
  grouped_gemm_step(op, "down_proj", activated, down_proj, index.offs, rows);  // in the place of what went in
  return moe_unpermute_step(op, rows, topk_weights, index.row_map);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) { m.impl("moe_mlp", TORCH_BOX(&moe_mlp)); }

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) { m.impl("moe_mlp", TORCH_BOX(&moe_mlp)); }
#endif

}  // namespace mixtral
