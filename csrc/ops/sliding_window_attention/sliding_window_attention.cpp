#include "sliding_window_attention.h"

#include <cmath>
#include <type_traits>

#include "../cpu/shared_work.h"
#include "../dispatch.h"
#include "attend.h"
#include "decode_attention.h"

#ifdef MIXTRAL_WITH_HOPPER
#include "../cuda/kernel_choice.h"
#include "hopper/attention_decode_hopper.h"
#include "hopper/attention_prefill_hopper.h"
#endif

namespace mixtral {

void check_attention_tensors(const char* op, const Tensor& q, const char* k_name, const Tensor& k, const char* v_name,
                             const Tensor& v) {
  check_rank(op, "q", q, 3, "[T, Nq, D]");
  check_float(op, "q", q);
  MIXTRAL_CHECK(q.size(2) > 0, op, ": q must have a head dim >= 1, got shape ", shape_string(q));
  check_dtype(op, k_name, k, q.scalar_type());
  check_same_device(op, k_name, k, q);
  check_size(op, k_name, k, k.dim() - 1, q.size(2));
  const int64_t num_kv_heads = k.size(k.dim() - 2);
  MIXTRAL_CHECK(num_kv_heads > 0 && q.size(1) % num_kv_heads == 0, op, ": q must have a multiple of the ", num_kv_heads,
                " key/value heads, got shape ", shape_string(q));
  check_dtype(op, v_name, v, q.scalar_type());
  check_same_device(op, v_name, v, q);
  check_rank(op, v_name, v, k.dim(), "as the keys");
  for (int64_t d = 0; d < k.dim(); ++d) check_size(op, v_name, v, d, k.size(d));
}

void check_cu_seqlens(const char* op, const char* name, const int64_t* cu_seqlens, int64_t sequences, int64_t total) {
  MIXTRAL_CHECK(cu_seqlens[0] == 0, op, ": ", name, " must start at 0, got ", cu_seqlens[0]);
  for (int64_t b = 0; b < sequences; ++b)
    MIXTRAL_CHECK(cu_seqlens[b] <= cu_seqlens[b + 1], op, ": ", name, " must never fall, got ", cu_seqlens[b + 1],
                  " after ", cu_seqlens[b]);
  MIXTRAL_CHECK(cu_seqlens[sequences] == total, op, ": ", name, " must end at ", total, ", got ",
                cu_seqlens[sequences]);
}

namespace {

// Chosen from shapes alone: a call can be captured in a CUDA graph.
template <typename T>
int launch_attention_on_gpu(const Tensor& q, const AttentionProblem<T>& problem, cudaStream_t stream) {
#ifdef MIXTRAL_WITH_HOPPER
  if constexpr (std::is_same_v<T, BFloat16>) {
    const bool hopper = use_hopper_kernels(q) && problem.lse == nullptr;
    if (hopper && takes_attention_decode_hopper(problem)) {  // few queries a sequence
      const int64_t bytes = decode_workspace_bytes(problem, decode_plan(problem));
      const Tensor workspace = new_tensor(q, {bytes}, ScalarType::Byte);
      return launch_attention_decode_hopper(problem, mutable_ptr<unsigned char>(workspace), stream);
    }
    if (hopper && takes_attention_prefill_hopper(problem)) return launch_attention_prefill_hopper(problem, stream);
  }
#else
  (void)q;
#endif
  return launch_attention_cuda(problem, stream);
}

}  // namespace

Tensor attend(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
              const KeyLayout& keys, int64_t window, bool causal, std::optional<double> scale, const Tensor* lse) {
  const int64_t tokens = q.size(0), num_heads = q.size(1), head_dim = q.size(2), num_kv_heads = k.size(k.dim() - 2);
  const int64_t sequences = cu_seqlens_q.size(0) - 1;
  MIXTRAL_CHECK(tokens == 0 || sequences > 0, op, ": cu_seqlens_q must have at least 2 elements, got shape ",
                shape_string(cu_seqlens_q));
  const Tensor q_contiguous = as_contiguous(q);
  Tensor out = new_tensor(q, q.sizes());
  dispatch_float(op, q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const AttentionProblem<T> problem{const_ptr<T>(q_contiguous),
                                      const_ptr<T>(k),
                                      const_ptr<T>(v),
                                      mutable_ptr<T>(out),
                                      const_ptr<int64_t>(cu_seqlens_q),
                                      keys,
                                      tokens,
                                      sequences,
                                      num_heads,
                                      num_kv_heads,
                                      head_dim,
                                      window,
                                      causal,
                                      score_scale(scale, head_dim),
                                      lse != nullptr ? mutable_ptr<float>(*lse) : nullptr};
    if constexpr (kWithCuda) {
      if (q.is_cuda()) {
        MIXTRAL_CHECK(head_dim <= kMaxHeadDimCuda, op, ": q must have a head dim of at most ", kMaxHeadDimCuda,
                      " on CUDA, got shape ", shape_string(q));
        const CudaScope scope(q);
        check_launch(op, launch_attention_on_gpu(q, problem, scope.stream()));
        return;
      }
    }
    if (takes_decode_attention_cpu(problem)) {
      decode_attention_cpu(problem, torch::stable::get_num_threads(),
                           [](int64_t count, const auto& body) { torch::stable::parallel_for(0, count, 1, body); });
      return;
    }
    cpu::SharedWork items = cpu::SharedWork::of_items(problem.num_items());
    parallel_rows(problem.num_items(), head_dim * 512, [&](int64_t, int64_t) { launch_attention_cpu(problem, items); });
  });
  return out;
}

PackedSequences packed_sequences(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t window, bool causal) {
  check_rank(op, "k", k, 3, "[Tk, Nkv, D]");
  check_attention_tensors(op, q, "k", k, "v", v);
  check_rank(op, "cu_seqlens_q", cu_seqlens_q, 1, "[B + 1]");
  check_index(op, "cu_seqlens_q", cu_seqlens_q);
  check_same_device(op, "cu_seqlens_q", cu_seqlens_q, q);
  MIXTRAL_CHECK(cu_seqlens_q.size(0) > 0, op, ": cu_seqlens_q must have at least 1 element, got shape ",
                shape_string(cu_seqlens_q));
  check_rank(op, "cu_seqlens_k", cu_seqlens_k, 1, "[B + 1]");
  check_index(op, "cu_seqlens_k", cu_seqlens_k);
  check_same_device(op, "cu_seqlens_k", cu_seqlens_k, q);
  check_size(op, "cu_seqlens_k", cu_seqlens_k, 0, cu_seqlens_q.size(0));
  check_window(op, window);
  MIXTRAL_CHECK(causal || window == 0, op, ": window must be 0 when causal is false, got ", window);
  const Tensor index_q = as_index(cu_seqlens_q, ScalarType::Long), index_k = as_index(cu_seqlens_k, ScalarType::Long);
  KeyLayout keys;
  keys.cu_seqlens = const_ptr<int64_t>(index_k);
  keys.pages = 1;
  keys.page_size = k.size(0);
  if (!q.is_cuda()) {
    const int64_t sequences = index_q.size(0) - 1;
    check_cu_seqlens(op, "cu_seqlens_q", const_ptr<int64_t>(index_q), sequences, q.size(0));
    check_cu_seqlens(op, "cu_seqlens_k", keys.cu_seqlens, sequences, k.size(0));
  }
  return {index_q, index_k, keys};
}

float score_scale(std::optional<double> scale, int64_t head_dim) {
  return static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim))));
}

namespace {

Tensor sliding_window_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                const Tensor& cu_seqlens_k, int64_t window, bool causal, std::optional<double> scale) {
  constexpr const char* kOp = "sliding_window_attention";
  const PackedSequences packed = packed_sequences(kOp, q, k, v, cu_seqlens_q, cu_seqlens_k, window, causal);
  return attend(kOp, q, as_contiguous(k), as_contiguous(v), packed.cu_seqlens_q, packed.keys, window, causal, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) { m.impl("sliding_window_attention", TORCH_BOX(&sliding_window_attention)); }

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("sliding_window_attention", TORCH_BOX(&sliding_window_attention));
}
#endif

}  // namespace mixtral
