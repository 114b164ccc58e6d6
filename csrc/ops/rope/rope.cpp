#include "rope.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "../dispatch.h"

namespace mixtral {
namespace {

constexpr const char* kOp = "rope";

void check_arguments(const Tensor& q, const Tensor& k, const Tensor& positions, double theta) {
  check_rank(kOp, "q", q, 3, "[T, Nq, D]");
  check_float(kOp, "q", q);
  check_rank(kOp, "k", k, 3, "[T, Nkv, D]");
  check_dtype(kOp, "k", k, q.scalar_type());
  check_same_device(kOp, "k", k, q);
  check_size(kOp, "k", k, 0, q.size(0));
  check_size(kOp, "k", k, 2, q.size(2));
  check_rank(kOp, "positions", positions, 1, "[T]");
  check_index(kOp, "positions", positions);
  check_same_device(kOp, "positions", positions, q);
  check_size(kOp, "positions", positions, 0, q.size(0));
  MIXTRAL_CHECK(q.size(2) % 2 == 0, kOp, ": q must have an even head dim, got shape ", shape_string(q));
  MIXTRAL_CHECK(theta > 0 && std::isfinite(theta), kOp, ": theta must be positive and finite, got ", theta);
}

// Rounded to f32 after each step, as torch computes 1.0 / theta ** (arange(0, D, 2) / D).
std::vector<float> inverse_frequencies(double theta, int64_t head_dim) {
  std::vector<float> out(head_dim / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    out[i] = 1.0f / static_cast<float>(std::pow(static_cast<double>(static_cast<float>(theta)), exponent));
  }
  return out;
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& positions, double theta,
                                bool interleaved) {
  check_arguments(q, k, positions, theta);
  const int64_t tokens = q.size(0), head_dim = q.size(2);
  const Tensor q_contiguous = torch::stable::contiguous(q), k_contiguous = torch::stable::contiguous(k);
  const Tensor index = as_index(positions, ScalarType::Long);
  Tensor q_out = torch::stable::new_empty(q, q.sizes()), k_out = torch::stable::new_empty(k, k.sizes());
  const std::vector<float> frequencies = inverse_frequencies(theta, head_dim);
  dispatch_float(kOp, q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const RopeTensor<T> q_rope{const_ptr<T>(q_contiguous), mutable_ptr<T>(q_out), q.size(1)};
    const RopeTensor<T> k_rope{const_ptr<T>(k_contiguous), mutable_ptr<T>(k_out), k.size(1)};
    const int64_t* index_ptr = const_ptr<int64_t>(index);
    if constexpr (kWithCuda) {
      if (q.is_cuda()) {
        MIXTRAL_CHECK(head_dim / 2 <= kMaxRopePairsCuda, kOp, ": q must have a head dim of at most ",
                      2 * kMaxRopePairsCuda, " on CUDA, got shape ", shape_string(q));
        const CudaScope scope(q);
        check_launch(kOp, launch_rope_cuda(q_rope, k_rope, index_ptr, frequencies.data(), tokens, head_dim, interleaved,
                                           scope.stream()));
        return;
      }
    }
    // An angle costs about as much as 16 rotated pairs.
    parallel_rows(tokens, (q.size(1) + k.size(1) + 16) * head_dim, [&](int64_t begin, int64_t end) {
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
