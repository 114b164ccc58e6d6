#include "rope.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "rope_arguments.h"

namespace mixtral {

void check_rope(const char* op, const Tensor& q, const Tensor& k, const Tensor& positions, double theta,
                const char* q_name, const char* k_name) {
  check_rank(op, q_name, q, 3, "[T, Nq, D]");
  check_float(op, q_name, q);
  check_rank(op, k_name, k, 3, "[T, Nkv, D]");
  check_dtype(op, k_name, k, q.scalar_type());
  check_same_device(op, k_name, k, q);
  check_size(op, k_name, k, 0, q.size(0));
  check_size(op, k_name, k, 2, q.size(2));
  check_rank(op, "positions", positions, 1, "[T]");
  check_index(op, "positions", positions);
  check_same_device(op, "positions", positions, q);
  check_size(op, "positions", positions, 0, q.size(0));
  MIXTRAL_CHECK(q.size(2) % 2 == 0, op, ": ", q_name, " must have an even head dim, got shape ", shape_string(q));
  MIXTRAL_CHECK(!q.is_cuda() || q.size(2) / 2 <= kMaxRopePairsCuda, op, ": ", q_name,
                " must have a head dim of at most ", 2 * kMaxRopePairsCuda, " on CUDA, got shape ", shape_string(q));
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

enum class Turn { kForth, kBack };

std::tuple<Tensor, Tensor> rotate(const char* op, const Tensor& q, const Tensor& k, const Tensor& positions,
                                  double theta, bool interleaved, Turn turn) {
  const int64_t tokens = q.size(0), head_dim = q.size(2);
  const Tensor q_rows = as_rows(q), k_rows = as_rows(k);
  const Tensor index = as_index(positions, ScalarType::Long);
  Tensor q_out = new_tensor(q, q.sizes()), k_out = new_tensor(k, k.sizes());
  std::vector<float> frequencies = inverse_frequencies(theta, head_dim);
  if (turn == Turn::kBack)
    for (float& frequency : frequencies) frequency = -frequency;
  dispatch_float(op, q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const RopeTensor<T> q_rope{const_ptr<T>(q_rows), q_rows.stride(0), mutable_ptr<T>(q_out), q.size(1)};
    const RopeTensor<T> k_rope{const_ptr<T>(k_rows), k_rows.stride(0), mutable_ptr<T>(k_out), k.size(1)};
    const int64_t* index_ptr = const_ptr<int64_t>(index);
    if constexpr (kWithCuda) {
      if (q.is_cuda()) {
        const CudaScope scope(q);
        check_launch(op, launch_rope_cuda(q_rope, k_rope, index_ptr, frequencies.data(), tokens, head_dim, interleaved,
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

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& positions, double theta,
                                bool interleaved) {
  check_rope("rope", q, k, positions, theta);
  return rotate("rope", q, k, positions, theta, interleaved, Turn::kForth);
}

std::tuple<Tensor, Tensor> rope_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& positions,
                                         double theta, bool interleaved) {
  check_rope("rope_backward", grad_q, grad_k, positions, theta, "grad_q", "grad_k");
  return rotate("rope_backward", grad_q, grad_k, positions, theta, interleaved, Turn::kBack);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
}
#endif

}  // namespace mixtral
