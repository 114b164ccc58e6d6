#include "moe_permute.h"

#include <limits>
#include <tuple>

#include "../dispatch.h"
#include "../internal_ops.h"

namespace mixtral {

internal::PermutationIndex internal::moe_permute(const char* op, const Tensor& x, const Tensor& topk_ids,
                                                 int64_t num_experts, const Tensor& out) {
  const int64_t tokens = topk_ids.size(0), top_k = topk_ids.size(1), copies = tokens * top_k, hidden = x.size(1);
  MIXTRAL_CHECK(copies <= std::numeric_limits<int32_t>::max(), op,
                ": topk_ids must have at most 2^31 - 1 entries, got ", copies);
  const Tensor x_contiguous = as_contiguous(x), ids = as_contiguous(topk_ids);
  const Tensor offs = new_tensor(x, {num_experts}, ScalarType::Int);
  const Tensor row_map = new_tensor(x, {tokens, top_k}, ScalarType::Int);
  const int64_t row_bytes = hidden * x.element_size();
  const char* x_ptr = const_ptr<char>(x_contiguous);
  char* out_ptr = mutable_ptr<char>(out);
  int32_t *offs_ptr = mutable_ptr<int32_t>(offs), *row_map_ptr = mutable_ptr<int32_t>(row_map);
  if constexpr (kWithCuda) {
    if (x.is_cuda()) {
      MIXTRAL_CHECK(num_experts <= kMaxExpertsCuda, op, ": num_experts must be at most ", kMaxExpertsCuda,
                    " on cuda, got ", num_experts);
      const CudaScope scope(x);
      check_launch(op, launch_moe_permute_cuda(x_ptr, index_array(ids), out_ptr, offs_ptr, row_map_ptr, tokens, top_k,
                                               num_experts, row_bytes, scope.stream()));
      return {offs, row_map};
    }
  }
  const int64_t bad = launch_moe_permute_index_cpu(index_array(ids), offs_ptr, row_map_ptr, copies, num_experts);
  MIXTRAL_CHECK(bad < 0, op, ": topk_ids must be in [0, ", num_experts, "), got ", index_array(ids)[bad], " at token ",
                bad / top_k);
  parallel_rows(tokens, top_k * row_bytes, [=](int64_t begin, int64_t end) {
    launch_moe_permute_copy_cpu(x_ptr, row_map_ptr, out_ptr, top_k, row_bytes, begin, end);
  });
  return {offs, row_map};
}

namespace {

// y [M, H], topk_weights [T, K], and where the copies of each token are in y -> [T, H]. rows.index is contiguous.
Tensor combine(const char* op, const Tensor& y, const Tensor& topk_weights, const CopyRows& rows) {
  const int64_t tokens = topk_weights.size(0), top_k = topk_weights.size(1), hidden = y.size(1);
  const Tensor y_contiguous = as_contiguous(y), weights = as_contiguous(topk_weights);
  const Tensor out = new_tensor(y, {tokens, hidden});
  const float* weights_ptr = const_ptr<float>(weights);
  dispatch_float(op, y.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* y_ptr = const_ptr<T>(y_contiguous);
    T* out_ptr = mutable_ptr<T>(out);
    if constexpr (kWithCuda) {
      if (y.is_cuda()) {
        const CudaScope scope(y);
        check_launch(
            op, launch_moe_unpermute_cuda(y_ptr, weights_ptr, rows, out_ptr, tokens, top_k, hidden, scope.stream()));
        return;
      }
    }
    parallel_rows(tokens, top_k * hidden, [=](int64_t begin, int64_t end) {
      launch_moe_unpermute_cpu(y_ptr, weights_ptr, rows, out_ptr, top_k, hidden, begin, end);
    });
  });
  return out;
}

}  // namespace

Tensor internal::moe_unpermute(const char* op, const Tensor& y, const Tensor& topk_weights, const Tensor& row_map) {
  const int64_t copies = row_map.numel(), top_k = row_map.size(1), rows = y.size(0);
  const Tensor map = as_contiguous(row_map);
  const IndexArray map_array = index_array(map);
  if (!y.is_cuda()) {
    for (int64_t i = 0; i < copies; ++i)
      MIXTRAL_CHECK(map_array[i] >= -1 && map_array[i] < rows, op, ": row_map must be in [-1, ", rows, "), got ",
                    map_array[i], " at token ", i / top_k);
  }
  return combine(op, y, topk_weights, {map_array, rows, /*in_place=*/false});
}

Tensor internal::moe_combine(const char* op, const Tensor& y, const Tensor& topk_weights, const Tensor& ids,
                             int64_t num_experts) {
  const Tensor ids_contiguous = as_contiguous(ids);
  return combine(op, y, topk_weights, {index_array(ids_contiguous), num_experts, /*in_place=*/true});
}

namespace {

std::tuple<Tensor, Tensor, Tensor> moe_permute(const Tensor& x, const Tensor& topk_ids, int64_t num_experts) {
  constexpr const char* op = "moe_permute";
  check_rank(op, "x", x, 2, "[T, H]");
  check_float(op, "x", x);
  check_rank(op, "topk_ids", topk_ids, 2, "[T, K]");
  check_index(op, "topk_ids", topk_ids);
  check_size(op, "topk_ids", topk_ids, 0, x.size(0));
  check_same_device(op, "topk_ids", topk_ids, x);
  MIXTRAL_CHECK(num_experts >= 1, op, ": num_experts must be >= 1, got ", num_experts);
  const Tensor permuted = new_tensor(x, {topk_ids.numel(), x.size(1)});
  const internal::PermutationIndex index = internal::moe_permute(op, x, topk_ids, num_experts, permuted);
  return {permuted, index.offs, index.row_map};
}

Tensor moe_unpermute(const Tensor& y, const Tensor& topk_weights, const Tensor& row_map) {
  constexpr const char* op = "moe_unpermute";
  check_rank(op, "y", y, 2, "[M, H]");
  check_float(op, "y", y);
  check_rank(op, "row_map", row_map, 2, "[T, K]");
  check_index(op, "row_map", row_map);
  check_same_device(op, "row_map", row_map, y);
  check_size(op, "y", y, 0, row_map.size(0) * row_map.size(1));
  check_rank(op, "topk_weights", topk_weights, 2, "[T, K]");
  check_dtype(op, "topk_weights", topk_weights, ScalarType::Float);
  check_size(op, "topk_weights", topk_weights, 0, row_map.size(0));
  check_size(op, "topk_weights", topk_weights, 1, row_map.size(1));
  check_same_device(op, "topk_weights", topk_weights, y);
  return internal::moe_unpermute(op, y, topk_weights, row_map);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_unpermute", TORCH_BOX(&moe_unpermute));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_unpermute", TORCH_BOX(&moe_unpermute));
}
#endif

}  // namespace mixtral
