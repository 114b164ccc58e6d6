// grad_x: a row of the router for each expert, added in order. grad_router: for a block of columns, eight experts at a
// time, sums over chains of 256 tokens stay in registers; the columns of a chain stay in the cache while all experts
// pass.
#include <algorithm>

#include "../cpu/buffer.h"
#include "../cpu/simd.h"
#include "moe_route.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kTileExperts = 8, kChain = 256;

// sums[e] += grad[t, e] x[t, :] over `tokens` rows of grad (stride E) and x (stride H), n <= 16 columns.
template <typename T>
MIXTRAL_INLINE void add_chain(const float* grad, const T* x, int64_t tokens, int64_t hidden, int64_t experts,
                              int64_t tile, int64_t n, Lanes (&sums)[kTileExperts]) {
  for (int64_t t = 0; t < tokens; ++t) {
    const Lanes values = n == kLanes ? load_lanes(x + t * hidden) : load_lanes(x + t * hidden, n);
#pragma GCC unroll 8
    for (int64_t e = 0; e < kTileExperts; ++e) {
      const float g = grad[t * experts + std::min(e, tile - 1)];
      for (int64_t j = 0; j < kLanes; ++j) sums[e].v[j] = __builtin_fmaf(g, values.v[j], sums[e].v[j]);
    }
  }
}

}  // namespace

template <typename T>
void launch_router_logits_backward_x_cpu(const float* grad, const float* router, T* grad_x, int64_t hidden,
                                         int64_t experts, int64_t begin, int64_t end) {
  for_cpu_isa([=] {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < hidden; h += kLanes) {
        const int64_t n = std::min(kLanes, hidden - h);
        Lanes sum{};
        for (int64_t e = 0; e < experts; ++e) {
          const float g = grad[t * experts + e];
          const float* row = router + e * hidden + h;
          const Lanes values = n == kLanes ? load_lanes(row) : load_lanes(row, n);
          for (int64_t j = 0; j < kLanes; ++j) sum.v[j] = __builtin_fmaf(g, values.v[j], sum.v[j]);
        }
        for (int64_t j = 0; j < n; ++j) grad_x[t * hidden + h + j] = from_float<T>(sum.v[j]);
      }
    }
  });
}

template <typename T, typename R>
void launch_router_logits_backward_router_cpu(const float* grad, const T* x, R* grad_router, int64_t tokens,
                                              int64_t hidden, int64_t experts, int64_t begin, int64_t end) {
  thread_local Buffer<float> buffer;
  float* totals = buffer.grow(experts * kGradColumns);  // [E, columns of a block]
  for_cpu_isa([=] {
    for (int64_t column = begin * kGradColumns; column < std::min(end * kGradColumns, hidden); column += kGradColumns) {
      const int64_t width = std::min(kGradColumns, hidden - column);
      std::fill_n(totals, experts * kGradColumns, 0.0f);
      for (int64_t first = 0; first < tokens; first += kChain) {
        const int64_t chain = std::min(kChain, tokens - first);
        for (int64_t e = 0; e < experts; e += kTileExperts) {
          const int64_t tile = std::min(kTileExperts, experts - e);
          for (int64_t h = 0; h < width; h += kLanes) {
            const int64_t n = std::min(kLanes, width - h);
            Lanes sums[kTileExperts] = {};
            add_chain(grad + first * experts + e, x + first * hidden + column + h, chain, hidden, experts, tile, n,
                      sums);
            for (int64_t i = 0; i < tile; ++i)
              for (int64_t j = 0; j < n; ++j) totals[(e + i) * kGradColumns + h + j] += sums[i].v[j];
          }
        }
      }
      for (int64_t e = 0; e < experts; ++e)
        for (int64_t j = 0; j < width; ++j)
          grad_router[e * hidden + column + j] = from_float<R>(totals[e * kGradColumns + j]);
    }
  });
}

template void launch_router_logits_backward_x_cpu(const float*, const float*, float*, int64_t, int64_t, int64_t,
                                                  int64_t);
template void launch_router_logits_backward_x_cpu(const float*, const float*, BFloat16*, int64_t, int64_t, int64_t,
                                                  int64_t);
template void launch_router_logits_backward_x_cpu(const float*, const float*, Half*, int64_t, int64_t, int64_t,
                                                  int64_t);

#define MIXTRAL_INSTANTIATE(T, R)                                                                               \
  template void launch_router_logits_backward_router_cpu(const float*, const T*, R*, int64_t, int64_t, int64_t, \
                                                         int64_t, int64_t);
MIXTRAL_INSTANTIATE(float, float)
MIXTRAL_INSTANTIATE(BFloat16, float)
MIXTRAL_INSTANTIATE(Half, float)
MIXTRAL_INSTANTIATE(BFloat16, BFloat16)
MIXTRAL_INSTANTIATE(Half, Half)
#undef MIXTRAL_INSTANTIATE

}  // namespace mixtral
