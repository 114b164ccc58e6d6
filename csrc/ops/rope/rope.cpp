#include "rope.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "rope_arguments.h"

namespace mixtral {

void check_rope(const char* op, const Tensor& q, const Tensor& k, const Tensor& positions, double theta) {
  check_rank(op, "q", q, 3, "[T, Nq, D]");
  check_float(op, "q", q);
  check_rank(op, "k", k, 3, "[T, Nkv, D]");
  check_dtype(op, "k", k, q.scalar_type());
  check_same_device(op, "k", k, q);
  check_size(op, "k", k, 0, q.size(0));
  check_size(op, "k", k, 2, q.size(2));
  check_rank(op, "positions", positions, 1, "[T]");
  check_index(op, "positions", positions);
  check_same_device(op, "positions", positions, q);
  check_size(op, "positions", positions, 0, q.size(0));
  MIXTRAL_CHECK(q.size(2) % 2 == 0, op, ": q must have an even head dim, got shape ", shape_string(q));
  MIXTRAL_CHECK(!q.is_cuda() || q.size(2) / 2 <= kMaxRopePairsCuda, op, ": q must have a head dim of at most ",
                2 * kMaxRopePairsCuda, " on CUDA, got shape ", shape_string(q));
  MIXTRAL_CHECK(theta > 0 && std::isfinite(theta), op, ": theta must be positive and finite, got ", theta);
}

std::vector<float> inverse_frequencies(double theta, int64_t head_dim) {
  std::vector<float> out(head_dim / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    out[i] = 1.0f / static_cast<float>(std::pow(static_cast<double>(static_cast<float>(theta)), exponent));
  }
  return out;
}

Tensor as_rows(const Tensor& x) {
  const bool heads_apart = x.size(1) > 1 && x.stride(1) != x.size(2);
  return heads_apart || (x.size(2) > 1 && x.stride(2) != 1) ? as_contiguous(x) : x;
}

namespace {

constexpr const char* kOp = "rope";

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& positions, double theta,
                                bool interleaved) {
  check_rope(kOp, q, k, positions, theta);
  const int64_t tokens = q.size(0), head_dim = q.size(2);
  const Tensor q_rows = as_rows(q), k_rows = as_rows(k);
  const Tensor index = as_index(positions, ScalarType::Long);
  Tensor q_out = new_tensor(q, q.sizes()), k_out = new_tensor(k, k.sizes());
  const std::vector<float> frequencies = inverse_frequencies(theta, head_dim);
  dispatch_float(kOp, q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const RopeTensor<T> q_rope{const_ptr<T>(q_rows), q_rows.stride(0), mutable_ptr<T>(q_out), q.size(1)};
    const RopeTensor<T> k_rope{const_ptr<T>(k_rows), k_rows.stride(0), mutable_ptr<T>(k_out), k.size(1)};
    const int64_t* index_ptr = const_ptr<int64_t>(index);
    if constexpr (kWithCuda) {
      if (q.is_cuda()) {
        const CudaScope scope(q);
        check_launch(kOp, launch_rope_cuda(q_rope, k_rope, index_ptr, frequencies.data(), tokens, head_dim, interleaved,
                                           scope.stream()));
        return;
      }
    }
    parallel_rows(tokens, rope_work(q.size(1) + k.size(1), head_dim), [&](int64_t begin, int64_t end) {
      launch_rope_cpu(q_rope, k_rope, index_ptr, frequencies.data(), head_dim, interleaved, begin, end);
    });
  });
  return {q_out, k_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) { m.impl("rope", TORCH_BOX(&rope)); }

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) { m.impl("rope", TORCH_BOX(&rope)); }
#endif

}  // namespace mixtral
