#include "moe_permute.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

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
      return {offs, row_map, copies};
    }
  }
  const int64_t bad = launch_moe_permute_index_cpu(index_array(ids), offs_ptr, row_map_ptr, copies, num_experts);
  MIXTRAL_CHECK(bad < 0, op, ": topk_ids must be in [0, ", num_experts, "), or -1 for none, got ",
                index_array(ids)[bad], " at token ", bad / top_k);
  const int64_t kept = offs_ptr[num_experts - 1];
  parallel_rows(tokens, top_k * row_bytes, [=](int64_t begin, int64_t end) {
    launch_moe_permute_copy_cpu(x_ptr, row_map_ptr, out_ptr, top_k, row_bytes, begin, end);
  });
  std::fill_n(out_ptr + kept * row_bytes, (copies - kept) * row_bytes, char{0});
  return {offs, row_map, kept};
}

namespace {

// y [M, H], weights [T, K] (null: all 1), and where the copies of each token are in y -> [T, H]. rows.index is
// contiguous.
Tensor combine(const char* op, const Tensor& y, const Tensor* topk_weights, const CopyRows& rows, int64_t tokens,
               int64_t top_k) {
  const int64_t hidden = y.size(1);
  const Tensor y_contiguous = as_contiguous(y), weights = topk_weights ? as_contiguous(*topk_weights) : y_contiguous;
  const Tensor out = new_tensor(y, {tokens, hidden});
  const float* weights_ptr = topk_weights ? const_ptr<float>(weights) : nullptr;
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

// row_map [T, K], contiguous, in [-1, rows); with `once`, no row twice. Looks at the data, so on the CPU alone.
void check_row_map(const char* op, const Tensor& row_map, int64_t rows, bool once) {
  if (row_map.is_cuda()) return;
  const IndexArray map = index_array(row_map);
  std::vector<bool> seen(once ? rows : 0);
  for (int64_t i = 0; i < row_map.numel(); ++i) {
    const int64_t row = map[i];
    MIXTRAL_CHECK(row >= -1 && row < rows, op, ": row_map must be in [-1, ", rows, "), got ", row, " at token ",
                  i / row_map.size(1));
    if (!once || row < 0) continue;
    MIXTRAL_CHECK(!seen[row], op, ": row_map must hold a row once, got ", row, " again at token ", i / row_map.size(1));
    seen[row] = true;
  }
}

}  // namespace

Tensor internal::moe_unpermute(const char* op, const Tensor& y, const Tensor& topk_weights, const Tensor& row_map) {
  const Tensor map = as_contiguous(row_map);
  check_row_map(op, map, y.size(0), /*once=*/false);
  return combine(op, y, &topk_weights, {index_array(map), y.size(0), /*in_place=*/false}, map.size(0), map.size(1));
}

Tensor internal::moe_permute_backward(const char* op, const Tensor& grad, const Tensor& row_map) {
  const Tensor map = as_contiguous(row_map);
  check_row_map(op, map, grad.size(0), /*once=*/false);
  return combine(op, grad, nullptr, {index_array(map), grad.size(0), /*in_place=*/false}, map.size(0), map.size(1));
}

Tensor internal::moe_combine(const char* op, const Tensor& y, const Tensor& topk_weights, const Tensor& ids,
                             int64_t num_experts) {
  const Tensor ids_contiguous = as_contiguous(ids);
  return combine(op, y, &topk_weights, {index_array(ids_contiguous), num_experts, /*in_place=*/true}, ids.size(0),
                 ids.size(1));
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

// rows [M, H], row_map [T, K]
void check_rows(const char* op, const char* name, const Tensor& rows, const Tensor& row_map) {
  check_rank(op, name, rows, 2, "[M, H]");
  check_float(op, name, rows);
  check_rank(op, "row_map", row_map, 2, "[T, K]");
  check_index(op, "row_map", row_map);
  check_same_device(op, "row_map", row_map, rows);
  check_size(op, name, rows, 0, row_map.size(0) * row_map.size(1));
}

void check_unpermute(const char* op, const Tensor& y, const Tensor& topk_weights, const Tensor& row_map) {
  check_rows(op, "y", y, row_map);
  check_rank(op, "topk_weights", topk_weights, 2, "[T, K]");
  check_dtype(op, "topk_weights", topk_weights, ScalarType::Float);
  check_size(op, "topk_weights", topk_weights, 0, row_map.size(0));
  check_size(op, "topk_weights", topk_weights, 1, row_map.size(1));
  check_same_device(op, "topk_weights", topk_weights, y);
}

Tensor moe_unpermute(const Tensor& y, const Tensor& topk_weights, const Tensor& row_map) {
  constexpr const char* op = "moe_unpermute";
  check_unpermute(op, y, topk_weights, row_map);
  return internal::moe_unpermute(op, y, topk_weights, row_map);
}

// grad [M, H], row_map [T, K] -> grad_x [T, H]
Tensor moe_permute_backward(const Tensor& grad, const Tensor& row_map) {
  constexpr const char* op = "moe_permute_backward";
  check_rows(op, "grad", grad, row_map);
  return internal::moe_permute_backward(op, grad, row_map);
}

// grad [T, H], y [M, H], topk_weights [T, K], row_map [T, K] -> (grad_y [M, H], grad_topk_weights [T, K]), each without
// elements if not wanted.
std::tuple<Tensor, Tensor> moe_unpermute_backward(const Tensor& grad, const Tensor& y, const Tensor& topk_weights,
                                                  const Tensor& row_map, bool want_y, bool want_topk_weights) {
  constexpr const char* op = "moe_unpermute_backward";
  check_unpermute(op, y, topk_weights, row_map);
  check_rank(op, "grad", grad, 2, "[T, H]");
  check_dtype(op, "grad", grad, y.scalar_type());
  check_size(op, "grad", grad, 0, row_map.size(0));
  check_size(op, "grad", grad, 1, y.size(1));
  check_same_device(op, "grad", grad, y);
  const Tensor map = as_contiguous(row_map), weights = as_contiguous(topk_weights);
  const Tensor grad_contiguous = as_contiguous(grad), y_contiguous = as_contiguous(y);
  check_row_map(op, map, y.size(0), /*once=*/true);
  const int64_t tokens = map.size(0), top_k = map.size(1), hidden = y.size(1);
  const Tensor grad_y = new_tensor(y, {want_y ? y.size(0) : 0, hidden});
  const Tensor grad_weights = new_tensor(weights, {want_topk_weights ? tokens : 0, top_k});
  const CopyRows rows{index_array(map), y.size(0), /*in_place=*/false};
  const float* weights_ptr = const_ptr<float>(weights);
  float* grad_weights_ptr = want_topk_weights ? mutable_ptr<float>(grad_weights) : nullptr;
  dispatch_float(op, y.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T *grad_ptr = const_ptr<T>(grad_contiguous), *y_ptr = const_ptr<T>(y_contiguous);
    T* grad_y_ptr = want_y ? mutable_ptr<T>(grad_y) : nullptr;
    if constexpr (kWithCuda) {
      if (y.is_cuda()) {
        const CudaScope scope(y);
        check_launch(op, launch_moe_unpermute_backward_cuda(grad_ptr, y_ptr, weights_ptr, rows, grad_y_ptr,
                                                            grad_weights_ptr, tokens, top_k, hidden, scope.stream()));
        return;
      }
    }
    bool dropped = false;
    for (int64_t i = 0; i < tokens * top_k; ++i) dropped = dropped || rows[i] < 0;
    if (dropped) std::fill_n(grad_y_ptr, grad_y.numel(), T{});  // rows that no copy has get no gradient
    parallel_rows(tokens, top_k * hidden, [=](int64_t begin, int64_t end) {
      launch_moe_unpermute_backward_cpu(grad_ptr, y_ptr, weights_ptr, rows, grad_y_ptr, grad_weights_ptr, top_k, hidden,
                                        begin, end);
    });
  });
  return {grad_y, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_permute_backward", TORCH_BOX(&moe_permute_backward));
  m.impl("moe_unpermute", TORCH_BOX(&moe_unpermute));
  m.impl("moe_unpermute_backward", TORCH_BOX(&moe_unpermute_backward));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_permute_backward", TORCH_BOX(&moe_permute_backward));
  m.impl("moe_unpermute", TORCH_BOX(&moe_unpermute));
  m.impl("moe_unpermute_backward", TORCH_BOX(&moe_unpermute_backward));
}
#endif

}  // namespace mixtral
