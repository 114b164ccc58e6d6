// A logit is a dot product along H: each lane of a vector sums its share of the terms in order, and the lanes are
// folded in one tree. The sums of a few tokens and eight experts stay in registers, so that each value loaded serves
// several of them. Neither the tokens beside it nor the thread changes the bits of a logit.
//
// Bound: x is read once from memory, in blocks of tokens that stay in L2 while all experts pass; so does a group of
// eight experts (128 KB in f32 at Mixtral's shape) while the tokens of a block pass.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../cpu/buffer.h"
#include "../cpu/simd.h"
#include "../topk_softmax/topk_softmax.h"
#include "moe_route.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kTileExperts = 8, kBlockTokens = 48;

template <int kBytes>
struct VectorOf {
  static constexpr int64_t kLanes = kBytes / sizeof(float);
  typedef float Float __attribute__((vector_size(kBytes)));
  typedef float FloatInMemory __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef uint32_t Word __attribute__((vector_size(kBytes)));
  typedef uint16_t HalfWord __attribute__((vector_size(kBytes / 2)));
};

// out: `count` values from p on, then zeros.
template <int kBytes, typename T>
MIXTRAL_INLINE void load(const T* p, int64_t count, typename VectorOf<kBytes>::Float& out) {
  using V = VectorOf<kBytes>;
  if constexpr (std::is_same_v<T, float>) {
    if (count == V::kLanes) {  // not through the stack, in halves, which a load of the whole would have to wait for
      out = *reinterpret_cast<const typename V::FloatInMemory*>(p);
      return;
    }
  }
  T values[V::kLanes] = {};
  std::memcpy(static_cast<void*>(values), p, (count == V::kLanes ? V::kLanes : count) * sizeof(T));
  if constexpr (std::is_same_v<T, BFloat16>) {  // the upper half of an f32
    typename V::HalfWord bits;
    std::memcpy(&bits, values, sizeof bits);
    const typename V::Word words = __builtin_convertvector(bits, typename V::Word) << 16;
    std::memcpy(&out, &words, sizeof out);
  } else {
    float floats[V::kLanes];
    for (int64_t j = 0; j < V::kLanes; ++j) floats[j] = to_float(values[j]);
    std::memcpy(&out, floats, sizeof out);
  }
}

// The products of `count` depths from h on; router: the rows of eight experts.
template <int kBytes, int kTokens, typename T>
MIXTRAL_INLINE void add_products(const T* x, int64_t hidden, const float* const (&router)[kTileExperts], int64_t h,
                                 int64_t count, typename VectorOf<kBytes>::Float (&sums)[kTokens][kTileExperts]) {
  typename VectorOf<kBytes>::Float values[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) load<kBytes>(x + t * hidden + h, count, values[t]);
#pragma GCC unroll 8
  for (int e = 0; e < kTileExperts; ++e) {
    typename VectorOf<kBytes>::Float weights;
    load<kBytes>(router[e] + h, count, weights);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) sums[t][e] += values[t] * weights;
  }
}

// x [kTokens, H] and router [experts <= 8, H] -> logits [kTokens, experts] of row stride `stride`. With fewer
// than eight experts, the last one fills the rest of the tile.
template <int kBytes, int kTokens, typename T>
MIXTRAL_INLINE void route_tile(const T* x, const float* router, int64_t hidden, int64_t experts, float* logits,
                               int64_t stride) {
  constexpr int64_t kLanes = VectorOf<kBytes>::kLanes;
  const float* rows[kTileExperts];
  for (int64_t e = 0; e < kTileExperts; ++e) rows[e] = router + std::min(e, experts - 1) * hidden;
  typename VectorOf<kBytes>::Float sums[kTokens][kTileExperts] = {};
  int64_t h = 0;
  for (; h + kLanes <= hidden; h += kLanes) add_products<kBytes, kTokens>(x, hidden, rows, h, kLanes, sums);
  if (h < hidden) add_products<kBytes, kTokens>(x, hidden, rows, h, hidden - h, sums);
  for (int t = 0; t < kTokens; ++t) {
    for (int64_t e = 0; e < experts; ++e) {
      float lanes[kLanes];
      std::memcpy(lanes, &sums[t][e], sizeof lanes);
      for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
      logits[t * stride + e] = lanes[0];
    }
  }
}

// x [tokens, H], router [E, H] -> logits [tokens, E]
template <int kBytes, int kTileTokens, typename T>
MIXTRAL_INLINE void route_block(const T* x, const float* router, int64_t tokens, int64_t hidden, int64_t experts,
                                float* logits) {
  for (int64_t e = 0; e < experts; e += kTileExperts, router += kTileExperts * hidden) {
    const int64_t group = std::min(kTileExperts, experts - e);
    int64_t t = 0;
    for (; t + kTileTokens <= tokens; t += kTileTokens)
      route_tile<kBytes, kTileTokens>(x + t * hidden, router, hidden, group, logits + t * experts + e, experts);
    for (; t < tokens; ++t)
      route_tile<kBytes, 1>(x + t * hidden, router, hidden, group, logits + t * experts + e, experts);
  }
}

// Tiles of as many tokens as the registers hold.
template <typename T>
void route_block_baseline(const T* x, const float* router, int64_t tokens, int64_t hidden, int64_t experts,
                          float* logits) {
  route_block<16, 1>(x, router, tokens, hidden, experts, logits);
}

#if defined(__x86_64__)
template <typename T>
MIXTRAL_TARGET_AVX2 void route_block_avx2(const T* x, const float* router, int64_t tokens, int64_t hidden,
                                          int64_t experts, float* logits) {
  route_block<32, 1>(x, router, tokens, hidden, experts, logits);
}

template <typename T>
MIXTRAL_TARGET_AVX512 void route_block_avx512(const T* x, const float* router, int64_t tokens, int64_t hidden,
                                              int64_t experts, float* logits) {
  route_block<64, 3>(x, router, tokens, hidden, experts, logits);
}
#endif

template <typename T>
auto route_block_kernel() {
#if defined(__x86_64__)
  if (cpu_isa() >= CpuIsa::kAvx512) return route_block_avx512<T>;
  if (cpu_isa() == CpuIsa::kAvx2) return route_block_avx2<T>;
#endif
  return route_block_baseline<T>;
}

}  // namespace

template <typename T, typename R>
void launch_router_logits_cpu(const T* x, const float* router, float* logits, int64_t hidden, int64_t experts,
                              int64_t begin, int64_t end) {
  const auto route = route_block_kernel<T>();
  for (int64_t first = begin; first < end; first += kBlockTokens) {
    const int64_t tokens = std::min(kBlockTokens, end - first);
    float* block = logits + first * experts;
    route(x + first * hidden, router, tokens, hidden, experts, block);
    for (int64_t i = 0; i < tokens * experts; ++i) block[i] = to_float(from_float<R>(block[i]));
  }
}

template <typename T, typename R>
void launch_moe_route_cpu(const T* x, const float* router, const float* select_bias, float* weights, int32_t* ids,
                          int64_t hidden, int64_t experts, int64_t top_k, bool renormalize, int64_t begin,
                          int64_t end) {
  thread_local Buffer<float> buffer;
  float* logits = buffer.grow(kBlockTokens * experts);  // [tokens of a block, E]
  for (int64_t first = begin; first < end; first += kBlockTokens) {
    const int64_t tokens = std::min(kBlockTokens, end - first);
    launch_router_logits_cpu<T, R>(x + first * hidden, router, logits, hidden, experts, 0, tokens);
    launch_topk_softmax_cpu(logits, select_bias, weights + first * top_k, ids + first * top_k, experts, top_k,
                            renormalize, 0, tokens);
  }
}

#define MIXTRAL_INSTANTIATE(T, R)                                                                                    \
  template void launch_router_logits_cpu<T, R>(const T*, const float*, float*, int64_t, int64_t, int64_t, int64_t);  \
  template void launch_moe_route_cpu<T, R>(const T*, const float*, const float*, float*, int32_t*, int64_t, int64_t, \
                                           int64_t, bool, int64_t, int64_t);
MIXTRAL_INSTANTIATE(float, float)
MIXTRAL_INSTANTIATE(BFloat16, float)
MIXTRAL_INSTANTIATE(Half, float)
MIXTRAL_INSTANTIATE(BFloat16, BFloat16)
MIXTRAL_INSTANTIATE(Half, Half)
#undef MIXTRAL_INSTANTIATE

}  // namespace mixtral
