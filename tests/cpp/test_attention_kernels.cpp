// The simple CUDA kernels of attention, forward and backward, on the emulated GPU, against f64.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gpu_emulator/hopper.h"
// The kernels, after the building blocks.
#include "ops/sliding_window_attention/sliding_window_attention_backward_kernels.cuh"
#include "ops/sliding_window_attention/sliding_window_attention_kernels.cuh"

namespace mixtral::cuda {
namespace {

struct Options {
  std::vector<int64_t> lengths_q, lengths_k;
  int64_t heads = 4, kv_heads = 2, head_dim = 20, window = 0;
  bool causal = true;
};

std::vector<int64_t> starts(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> sums{0};
  for (const int64_t length : lengths) sums.push_back(sums.back() + length);
  return sums;
}

std::vector<float> normal_numbers(int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(size);
  for (float& value : x) value = normal(random);
  return x;
}

// Inputs and results of both passes.
struct Attention {
  Options options;
  std::vector<int64_t> cu_q, cu_k;
  std::vector<float> q, k, v, grad, out, lse, delta, grad_q, grad_k, grad_v;

  explicit Attention(const Options& o) : options(o), cu_q(starts(o.lengths_q)), cu_k(starts(o.lengths_k)) {
    const int64_t size_q = cu_q.back() * o.heads * o.head_dim, size_k = cu_k.back() * o.kv_heads * o.head_dim;
    q = normal_numbers(size_q, 1);
    grad = normal_numbers(size_q, 2);
    k = normal_numbers(size_k, 3);
    v = normal_numbers(size_k, 4);
  }

  AttentionBackwardProblem<float> problem() {
    const Options& o = options;
    KeyLayout keys;
    keys.cu_seqlens = cu_k.data();
    keys.pages = 1;
    keys.page_size = cu_k.back();
    AttentionProblem<float> forward{q.data(),    k.data(),   v.data(),    out.data(),
                                    cu_q.data(), keys,       cu_q.back(), static_cast<int64_t>(o.lengths_q.size()),
                                    o.heads,     o.kv_heads, o.head_dim,  o.window,
                                    o.causal,    0.3f,       lse.data()};
    AttentionBackwardProblem<float> backward{forward,       grad.data(),   out.data(),   lse.data(),
                                             grad_q.data(), grad_k.data(), grad_v.data()};
    backward.delta = delta.data();
    return backward;
  }

  // On the emulated GPU; what no kernel writes stays NaN.
  template <int kWidth>
  void run(uint64_t seed) {
    const Options& o = options;
    for (auto* x : {&out, &grad_q}) x->assign(q.size(), NAN);
    for (auto* x : {&grad_k, &grad_v}) x->assign(k.size(), NAN);
    for (auto* x : {&lse, &delta}) x->assign(cu_q.back() * o.heads, NAN);
    const AttentionBackwardProblem<float> backward = problem();
    const AttentionProblem<float>& p = backward.forward;
    const auto size = [&](int64_t tokens, int64_t rows) {
      return static_cast<unsigned>(num_query_tiles(tokens, p.sequences, rows));
    };
    const int64_t group = o.heads / o.kv_heads, heads = heads_per_tile(group);
    const int tile_tokens = static_cast<int>(kAttentionRows / heads);
    const auto head_tiles = static_cast<unsigned>(o.kv_heads * ((group + heads - 1) / heads));
    emulator::launch({{size(p.tokens, tile_tokens), head_tiles, 1},
                      kAttentionThreads,
                      attention_shared_floats(kWidth) * sizeof(float),
                      seed},
                     [&] { attention_tile_kernel<float, kWidth>(p, tile_tokens); });
    constexpr int kRows = backward_rows(kWidth), kThreads = backward_threads(kWidth);
    constexpr size_t kBytes = backward_shared_floats(kWidth) * sizeof(float);
    emulator::launch({{size(p.tokens, kRows), static_cast<unsigned>(o.heads), 1}, kThreads, kBytes, seed},
                     [&] { attention_backward_queries_kernel<float, kWidth>(backward); });
    emulator::launch({{size(p.keys.page_size, kRows), static_cast<unsigned>(o.kv_heads), 1}, kThreads, kBytes, seed},
                     [&] { attention_backward_keys_kernel<float, kWidth>(backward); });
  }
};

// The results of a query and the gradients that follow from it, by definition, in f64.
struct Expected {
  std::vector<double> out, lse, grad_q, grad_k, grad_v;

  explicit Expected(Attention& a)
      : out(a.q.size()),
        lse(a.cu_q.back() * a.options.heads),
        grad_q(a.q.size()),
        grad_k(a.k.size()),
        grad_v(a.k.size()) {
    const AttentionProblem<float> p = a.problem().forward;
    for (int64_t b = 0; b < p.sequences; ++b)
      for (int64_t t = a.cu_q[b]; t < a.cu_q[b + 1]; ++t)
        for (int64_t h = 0; h < p.num_heads; ++h) add_query(a, p, b, t, h);
  }

  void add_query(const Attention& a, const AttentionProblem<float>& p, int64_t b, int64_t t, int64_t h) {
    const int64_t dim = p.head_dim, row = (t * p.num_heads + h) * dim, h_k = h * p.num_kv_heads / p.num_heads;
    const KeyRange seen = p.visible(b, t);
    const auto key_row = [&](int64_t key) { return ((a.cu_k[b] + key) * p.num_kv_heads + h_k) * dim; };
    const auto dot = [&](const auto* x, const auto* y) {
      double sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(x[d]) * y[d];
      return sum;
    };
    double sum = 0;
    std::vector<double> weights;
    for (int64_t key = seen.begin; key < seen.end; ++key) {
      weights.push_back(std::exp(dot(&a.q[row], &a.k[key_row(key)]) * p.scale));
      sum += weights.back();
    }
    lse[h * p.tokens + t] = std::log(sum);
    for (int64_t key = seen.begin; key < seen.end; ++key) {
      double& weight = weights[key - seen.begin];
      weight /= sum;
      for (int64_t d = 0; d < dim; ++d) out[row + d] += weight * a.v[key_row(key) + d];
    }
    const double delta = dot(&a.grad[row], &out[row]);
    for (int64_t key = seen.begin; key < seen.end; ++key) {
      const double weight = weights[key - seen.begin];
      const double ds = p.scale * weight * (dot(&a.grad[row], &a.v[key_row(key)]) - delta);
      for (int64_t d = 0; d < dim; ++d) {
        grad_q[row + d] += ds * a.k[key_row(key) + d];
        grad_k[key_row(key) + d] += ds * a.q[row + d];
        grad_v[key_row(key) + d] += weight * a.grad[row + d];
      }
    }
  }
};

void expect_near(const std::vector<float>& actual, const std::vector<double>& expected, const char* name) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::isinf(expected[i]) && actual[i] == expected[i]) continue;  // lse of a query without keys
    ASSERT_NEAR(actual[i], expected[i], 1e-5 * (1 + std::abs(expected[i]))) << name << " " << i;
  }
}

template <int kWidth>
void expect_matches_definition(const Options& options) {
  Attention attention(options);
  const Expected expected(attention);
  for (const uint64_t seed : {0, 1}) {
    attention.run<kWidth>(seed);
    expect_near(attention.out, expected.out, "out");
    expect_near(attention.lse, expected.lse, "lse");
    expect_near(attention.grad_q, expected.grad_q, "grad_q");
    expect_near(attention.grad_k, expected.grad_k, "grad_k");
    expect_near(attention.grad_v, expected.grad_v, "grad_v");
  }
}

TEST(AttentionKernels, PackedSequencesAndWindows) {
  for (const int64_t window : {0, 1, 7, 40}) {
    expect_matches_definition<64>({{33, 1, 0, 70}, {33, 1, 5, 70}, 4, 2, 20, window});
    expect_matches_definition<64>({{40, 3, 9}, {10, 3, 75}, 2, 2, 33, window});
  }
}

TEST(AttentionKernels, WithoutCausality) {
  expect_matches_definition<64>({{33, 4, 2}, {70, 0, 9}, 3, 1, 64, 0, false});
}

TEST(AttentionKernels, WiderHeads) {
  expect_matches_definition<128>({{20, 35}, {40, 35}, 2, 1, 128, 30});
  expect_matches_definition<256>({{20, 35}, {40, 35}, 2, 1, 200, 30});
}

// Keys outside the window of the last queries, and queries that are NaN, reach only what sees them or is seen by them.
TEST(AttentionKernels, NanReachesOnlyWhatSeesIt) {
  constexpr int64_t kLength = 70, kWindow = 9, kKey = 20, kQuery = 50;
  Attention attention({{kLength}, {kLength}, 1, 1, 8, kWindow});
  attention.run<64>(0);
  const Attention clean = attention;
  for (int64_t d = 0; d < 8; ++d) {
    attention.k[kKey * 8 + d] = attention.v[kKey * 8 + d] = NAN;
    attention.grad[kQuery * 8 + d] = NAN;
  }
  attention.run<64>(0);
  const auto sees = [](int64_t query, int64_t key) { return query - key >= 0 && query - key < kWindow; };
  for (int64_t t = 0; t < kLength; ++t) {
    bool near_key = false;  // some query sees this key and the NaN key
    for (int64_t query = 0; query < kLength; ++query) near_key |= sees(query, t) && sees(query, kKey);
    const bool bad_query = sees(t, kKey) || t == kQuery, bad_key = near_key || sees(kQuery, t);
    EXPECT_EQ(std::isnan(attention.grad_q[t * 8]), bad_query) << t;
    EXPECT_EQ(std::isnan(attention.grad_k[t * 8]), bad_key) << t;
    EXPECT_EQ(std::isnan(attention.grad_v[t * 8]), bad_key) << t;
    EXPECT_TRUE(bad_query || attention.grad_q[t * 8] == clean.grad_q[t * 8]) << t;
    EXPECT_TRUE(bad_key || attention.grad_k[t * 8] == clean.grad_k[t * 8]) << t;
    EXPECT_TRUE(bad_key || attention.grad_v[t * 8] == clean.grad_v[t * 8]) << t;
  }
}

}  // namespace
}  // namespace mixtral::cuda
