// rolling_kv_cache_write:      cache[slot_mapping[t] div P, slot_mapping[t] mod P] = k[t], v[t]
// rolling_kv_cache_rope_write: the same of rope(k)[t] and v[t], with rope(q) as the result (../rope/rope.h)
// rolling_kv_cache_attention:  sliding-window attention whose keys lie in the pages of that cache
//
// The cache is a pool of pages of P rows. Position p of sequence b lies in page page_table[b, (p div P) mod R], row
// p mod P: with a window, R = ceil((W - 1 + chunk) / P) + 1 columns serve a sequence of any length, the rolling buffer
// of Jiang et al., "Mistral 7B" (2023), page by page. A chunk is written first; attention then reads the cache alone. A
// row that no query sees is never read: it may hold anything.
#pragma once

#include <cstdint>

#include "../cuda/stream.h"
#include "../rope/rope.h"

namespace mixtral {

// k, v [T, row_size] and the caches [slots, row_size], row_size = Nkv * D. Tokens [begin, end); slot_mapping [T] was
// checked.
template <typename T>
void launch_rolling_kv_cache_write_cpu(const T* k, const T* v, T* k_cache, T* v_cache, const int64_t* slot_mapping,
                                       int64_t row_size, int64_t begin, int64_t end);

// Slots outside [0, slots) are dropped. Of two tokens with one slot, either may win.
template <typename T>
int launch_rolling_kv_cache_write_cuda(const T* k, const T* v, T* k_cache, T* v_cache, const int64_t* slot_mapping,
                                       int64_t tokens, int64_t slots, int64_t row_size, cudaStream_t stream);

// Where the keys and values of a call come from, and the caches they go to.
template <typename T>
struct RopeWrite {
  RopeTensor<T> q, k;  // k.out is the cache [slots, Nkv, D]
  const T* v;          // [T, Nkv, D] with rows `v_stride` elements apart
  int64_t v_stride;
  T* v_cache;                   // [slots, Nkv, D]
  const int64_t* positions;     // [T]
  const int64_t* slot_mapping;  // [T]
};

// Tokens [begin, end); slots were checked. inverse_frequency [D/2].
template <typename T>
void launch_rolling_kv_cache_rope_write_cpu(RopeWrite<T> write, const float* inverse_frequency, int64_t head_dim,
                                            int64_t begin, int64_t end);

// Slots outside [0, slots) are dropped. inverse_frequency lies in host memory; D/2 is at most kMaxRopePairsCuda.
template <typename T>
int launch_rolling_kv_cache_rope_write_cuda(RopeWrite<T> write, const float* inverse_frequency, int64_t tokens,
                                            int64_t slots, int64_t head_dim, cudaStream_t stream);

}  // namespace mixtral
