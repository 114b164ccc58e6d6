#include "rolling_kv_cache.h"

#include <algorithm>
#include <vector>

#include "../dispatch.h"
#include "../rope/rope_arguments.h"
#include "../sliding_window_attention/attend.h"

namespace mixtral {
namespace {

constexpr const char* kWrite = "rolling_kv_cache_write";
constexpr const char* kRopeWrite = "rolling_kv_cache_rope_write";
constexpr const char* kAttention = "rolling_kv_cache_attention";

// A cache is written and read in place: a strided one cannot be copied.
void check_cache(const char* op, const char* name, const Tensor& cache) {
  check_rank(op, name, cache, 4, "[pages, P, Nkv, D]");
  MIXTRAL_CHECK(cache.is_contiguous(), op, ": ", name, " must be contiguous, got shape ", shape_string(cache),
                " with other strides");
}

// Everything is checked before the first write.
void check_slots(const char* op, const int64_t* slot_mapping, int64_t tokens, int64_t slots) {
  for (int64_t t = 0; t < tokens; ++t)
    MIXTRAL_CHECK(slot_mapping[t] >= 0 && slot_mapping[t] < slots, op, ": slot_mapping must lie in [0, ", slots,
                  "), got ", slot_mapping[t], " at token ", t);
  std::vector<int64_t> sorted(slot_mapping, slot_mapping + tokens);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  MIXTRAL_CHECK(twice == sorted.end(), op, ": slot_mapping must name every slot once, got ", *twice, " twice");
}

void check_write(const char* op, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                 const Tensor& slot_mapping) {
  check_cache(op, "k_cache", k_cache);
  check_float(op, "k_cache", k_cache);
  check_cache(op, "v_cache", v_cache);
  check_dtype(op, "v_cache", v_cache, k_cache.scalar_type());
  check_same_device(op, "v_cache", v_cache, k_cache);
  for (int64_t d = 0; d < 4; ++d) check_size(op, "v_cache", v_cache, d, k_cache.size(d));
  check_rank(op, "slot_mapping", slot_mapping, 1, "[T]");
  check_index(op, "slot_mapping", slot_mapping);
  check_same_device(op, "slot_mapping", slot_mapping, k_cache);
  const auto check_rows = [&](const char* name, const Tensor& rows) {
    check_rank(op, name, rows, 3, "[T, Nkv, D]");
    check_dtype(op, name, rows, k_cache.scalar_type());
    check_same_device(op, name, rows, k_cache);
    check_size(op, name, rows, 0, slot_mapping.size(0));
    check_size(op, name, rows, 1, k_cache.size(2));
    check_size(op, name, rows, 2, k_cache.size(3));
  };
  check_rows("k", k);
  check_rows("v", v);
}

void rolling_kv_cache_write(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                            const Tensor& slot_mapping) {
  check_write(kWrite, k_cache, v_cache, k, v, slot_mapping);
  const int64_t tokens = k.size(0), slots = k_cache.size(0) * k_cache.size(1);
  const int64_t row_size = k_cache.size(2) * k_cache.size(3);
  const Tensor k_contiguous = as_contiguous(k), v_contiguous = as_contiguous(v);
  const Tensor index = as_index(slot_mapping, ScalarType::Long);
  const int64_t* index_ptr = const_ptr<int64_t>(index);
  if (!k_cache.is_cuda()) check_slots(kWrite, index_ptr, tokens, slots);
  dispatch_float(kWrite, k_cache.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* k_ptr = const_ptr<T>(k_contiguous);
    const T* v_ptr = const_ptr<T>(v_contiguous);
    T* k_cache_ptr = mutable_ptr<T>(k_cache);
    T* v_cache_ptr = mutable_ptr<T>(v_cache);
    if constexpr (kWithCuda) {
      if (k_cache.is_cuda()) {
        const CudaScope scope(k_cache);
        check_launch(kWrite, launch_rolling_kv_cache_write_cuda(k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, index_ptr,
                                                                tokens, slots, row_size, scope.stream()));
        return;
      }
    }
    parallel_rows(tokens, row_size, [=](int64_t begin, int64_t end) {
      launch_rolling_kv_cache_write_cpu(k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, index_ptr, row_size, begin, end);
    });
  });
}

Tensor rolling_kv_cache_rope_write(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions,
                                   double theta, const Tensor& k_cache, const Tensor& v_cache,
                                   const Tensor& slot_mapping) {
  check_rope(kRopeWrite, q, k, positions, theta);
  check_write(kRopeWrite, k_cache, v_cache, k, v, slot_mapping);
  const int64_t tokens = q.size(0), slots = k_cache.size(0) * k_cache.size(1), head_dim = q.size(2);
  const Tensor q_rows = as_rows(q), k_rows = as_rows(k), v_rows = as_rows(v);
  const Tensor position_index = as_index(positions, ScalarType::Long), index = as_index(slot_mapping, ScalarType::Long);
  if (!q.is_cuda()) check_slots(kRopeWrite, const_ptr<int64_t>(index), tokens, slots);
  Tensor q_out = new_tensor(q, q.sizes());
  const std::vector<float> frequencies = inverse_frequencies(theta, head_dim);
  dispatch_float(kRopeWrite, q.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const RopeWrite<T> write{{const_ptr<T>(q_rows), q_rows.stride(0), mutable_ptr<T>(q_out), q.size(1)},
                             {const_ptr<T>(k_rows), k_rows.stride(0), mutable_ptr<T>(k_cache), k.size(1)},
                             const_ptr<T>(v_rows),
                             v_rows.stride(0),
                             mutable_ptr<T>(v_cache),
                             const_ptr<int64_t>(position_index),
                             const_ptr<int64_t>(index)};
    if constexpr (kWithCuda) {
      if (q.is_cuda()) {
        const CudaScope scope(q);
        check_launch(kRopeWrite, launch_rolling_kv_cache_rope_write_cuda(write, frequencies.data(), tokens, slots,
                                                                         head_dim, scope.stream()));
        return;
      }
    }
    parallel_rows(tokens, rope_work(q.size(1) + 2 * k.size(1), head_dim), [&](int64_t begin, int64_t end) {
      launch_rolling_kv_cache_rope_write_cpu(write, frequencies.data(), head_dim, begin, end);
    });
  });
  return q_out;
}

// Every key that a query sees must lie in a page of the pool, and no two of them in the same row of the buffer.
void check_pages(const int64_t* cu_seqlens_q, int64_t sequences, const KeyLayout& keys, int64_t window) {
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t queries = cu_seqlens_q[b + 1] - cu_seqlens_q[b], length = keys.kv_lens[b];
    MIXTRAL_CHECK(queries <= length, kAttention, ": kv_lens must count the queries of the call (", queries,
                  " in sequence ", b, "), got ", length);
    if (queries == 0) continue;
    const int64_t first_page = visible_keys(length - queries, length, window, true).begin / keys.page_size;
    const int64_t last_page = (length - 1) / keys.page_size;
    MIXTRAL_CHECK(last_page - first_page < keys.columns, kAttention, ": page_table must have at least ",
                  last_page - first_page + 1, " columns for the keys that sequence ", b, " sees, got ", keys.columns);
    for (int64_t page = first_page; page <= last_page; ++page)
      MIXTRAL_CHECK(keys.row(b, page * keys.page_size) >= 0, kAttention, ": page_table must lie in [0, ", keys.pages,
                    ") for the keys that sequence ", b, " sees, got ",
                    keys.page_table[b * keys.columns + page % keys.columns], " in column ", page % keys.columns);
  }
}

void check_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
                     const Tensor& cu_seqlens_q, const Tensor& kv_lens, int64_t window) {
  check_cache(kAttention, "k_cache", k_cache);
  check_attention_tensors(kAttention, q, "k_cache", k_cache, "v_cache", v_cache);
  check_cache(kAttention, "v_cache", v_cache);
  const auto check_index_tensor = [&](const char* name, const Tensor& t, int64_t rank, const char* symbols) {
    check_rank(kAttention, name, t, rank, symbols);
    check_index(kAttention, name, t);
    check_same_device(kAttention, name, t, q);
  };
  check_index_tensor("page_table", page_table, 2, "[B, R]");
  check_index_tensor("cu_seqlens_q", cu_seqlens_q, 1, "[B + 1]");
  check_index_tensor("kv_lens", kv_lens, 1, "[B]");
  check_size(kAttention, "cu_seqlens_q", cu_seqlens_q, 0, page_table.size(0) + 1);
  check_size(kAttention, "kv_lens", kv_lens, 0, page_table.size(0));
  MIXTRAL_CHECK(k_cache.size(1) > 0, kAttention, ": k_cache must have a page size >= 1, got shape ",
                shape_string(k_cache));
  MIXTRAL_CHECK(page_table.size(1) > 0, kAttention, ": page_table must have at least 1 column, got shape ",
                shape_string(page_table));
  check_window(kAttention, window);
}

Tensor rolling_kv_cache_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                  const Tensor& page_table, const Tensor& cu_seqlens_q, const Tensor& kv_lens,
                                  int64_t window, std::optional<double> scale) {
  check_attention(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lens, window);
  const Tensor index_q = as_index(cu_seqlens_q, ScalarType::Long), index_lens = as_index(kv_lens, ScalarType::Long);
  const Tensor index_pages = as_index(page_table, ScalarType::Long);
  KeyLayout keys;
  keys.kv_lens = const_ptr<int64_t>(index_lens);
  keys.page_table = const_ptr<int64_t>(index_pages);
  keys.pages = k_cache.size(0);
  keys.page_size = k_cache.size(1);
  keys.columns = page_table.size(1);
  if (!q.is_cuda()) {
    const int64_t sequences = page_table.size(0);
    check_cu_seqlens(kAttention, "cu_seqlens_q", const_ptr<int64_t>(index_q), sequences, q.size(0));
    check_pages(const_ptr<int64_t>(index_q), sequences, keys, window);
  }
  return attend(kAttention, q, k_cache, v_cache, index_q, keys, window, true, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixtral, CPU, m) {
  m.impl("rolling_kv_cache_write", TORCH_BOX(&rolling_kv_cache_write));
  m.impl("rolling_kv_cache_rope_write", TORCH_BOX(&rolling_kv_cache_rope_write));
  m.impl("rolling_kv_cache_attention", TORCH_BOX(&rolling_kv_cache_attention));
}

#ifdef MIXTRAL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mixtral, CUDA, m) {
  m.impl("rolling_kv_cache_write", TORCH_BOX(&rolling_kv_cache_write));
  m.impl("rolling_kv_cache_rope_write", TORCH_BOX(&rolling_kv_cache_rope_write));
  m.impl("rolling_kv_cache_attention", TORCH_BOX(&rolling_kv_cache_attention));
}
#endif

}  // namespace mixtral
