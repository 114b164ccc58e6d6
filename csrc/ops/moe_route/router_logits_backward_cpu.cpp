// Eight sums at a time stay in registers: they hide each other's latency. grad_x: of eight tokens, over all experts.
// grad_router: for a block of columns, of eight experts, over chains of 256 tokens; the columns of a chain stay in the
// cache while all experts pass.
#include <algorithm>

#include "../cpu/buffer.h"
#include "../cpu/simd.h"
#include "moe_route.h"

namespace mixtral {

using namespace cpu;

namespace {

constexpr int64_t kTile = 8, kChain = 256;

// The factors of a tile of sums: sum i < tile multiplies row k by grad[i * stride + k * step].
struct Factors {
  const float* grad;
  int64_t stride, step, tile;

  MIXTRAL_INLINE float at(int64_t i, int64_t k) const { return grad[std::min(i, tile - 1) * stride + k * step]; }
};

// sums[i] += factors(i, k) rows[k, :] over `count` rows [H] in order, n <= 16 columns.
template <typename T>
MIXTRAL_INLINE void add_rows(const Factors& factors, const T* rows, int64_t count, int64_t hidden, int64_t n,
                             Lanes (&sums)[kTile]) {
  for (int64_t k = 0; k < count; ++k) {
    const Lanes values = n == kLanes ? load_lanes(rows + k * hidden) : load_lanes(rows + k * hidden, n);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTile; ++i) {
      const float g = factors.at(i, k);
      for (int64_t j = 0; j < kLanes; ++j) sums[i].v[j] = __builtin_fmaf(g, values.v[j], sums[i].v[j]);
    }
  }
}

}  // namespace

template <typename T>
void launch_router_logits_backward_x_cpu(const float* grad, const float* router, T* grad_x, int64_t hidden,
                                         int64_t experts, int64_t begin, int64_t end) {
  for_cpu_isa([=] {
    for (int64_t t = begin; t < end; t += kTile) {
      const Factors factors{grad + t * experts, experts, 1, std::min(kTile, end - t)};
      for (int64_t h = 0; h < hidden; h += kLanes) {
        const int64_t n = std::min(kLanes, hidden - h);
        Lanes sums[kTile] = {};
        add_rows(factors, router + h, experts, hidden, n, sums);
        for (int64_t i = 0; i < factors.tile; ++i)
          for (int64_t j = 0; j < n; ++j) grad_x[(t + i) * hidden + h + j] = from_float<T>(sums[i].v[j]);
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
        for (int64_t e = 0; e < experts; e += kTile) {
          const Factors factors{grad + first * experts + e, 1, experts, std::min(kTile, experts - e)};
          for (int64_t h = 0; h < width; h += kLanes) {
            const int64_t n = std::min(kLanes, width - h);
            Lanes sums[kTile] = {};
            add_rows(factors, x + first * hidden + column + h, chain, hidden, n, sums);
            for (int64_t i = 0; i < factors.tile; ++i)
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
