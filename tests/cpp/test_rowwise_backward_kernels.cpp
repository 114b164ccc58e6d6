// The CUDA kernels for the gradients of rms_norm, add_rms_norm, swiglu and of moe_mlp's activation, on the emulated
// GPU, against plain loops.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "gpu_emulator/hopper.h"
// The kernels, after the building blocks.
#include "ops/cuda/division.cuh"
#include "ops/host_device.h"
#include "ops/moe_mlp/moe_mlp_backward_kernels.cuh"
#include "ops/rms_norm/rms_norm_backward_kernels.cuh"
#include "ops/swiglu/swiglu_backward_kernels.cuh"

namespace mixtral::cuda {
namespace {

std::vector<float> normal_values(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (auto& value : values) value = normal(random);
  return values;
}

struct NormGradients {
  std::vector<float> x, weight;
};

// grad, grad_sum (empty: none), x [T, H], weight [H]; as launch_rms_norm_backward_cuda launches.
NormGradients run_norm(const std::vector<float>& grad, const std::vector<float>& grad_sum, const std::vector<float>& x,
                       const std::vector<float>& weight, bool want_x) {
  const int64_t hidden = static_cast<int64_t>(weight.size()), rows = static_cast<int64_t>(x.size()) / hidden;
  const auto blocks = static_cast<unsigned>(ceil_div(rows, kNormRowBlock));
  const auto columns = static_cast<unsigned>(ceil_div(hidden, kNormBackwardThreads));
  NormGradients out{std::vector<float>(x.size(), NAN), std::vector<float>(hidden, NAN)};
  std::vector<float> scales(rows, NAN), block_sums(blocks * hidden, NAN);
  const RmsNormBackward<float> norm{grad.data(),
                                    grad_sum.empty() ? nullptr : grad_sum.data(),
                                    x.data(),
                                    weight.data(),
                                    want_x ? out.x.data() : nullptr,
                                    block_sums.data(),
                                    rows,
                                    hidden,
                                    1e-5f};
  emulator::launch({{static_cast<unsigned>(rows), 1, 1}, kNormBackwardThreads, 0, 1},
                   [&] { rms_norm_backward_row_kernel(norm, scales.data()); });
  emulator::launch({{blocks, columns, 1}, kNormBackwardThreads, 0, 2},
                   [&] { rms_norm_backward_weight_kernel(norm, scales.data()); });
  emulator::launch({{columns, 1, 1}, kNormBackwardThreads, 0, 3},
                   [&] { rms_norm_backward_sum_kernel<float>(block_sums.data(), out.weight.data(), blocks, hidden); });
  return out;
}

void expect_norm(int64_t rows, int64_t hidden, bool with_sum) {
  const std::vector<float> grad = normal_values(rows * hidden, 1), x = normal_values(rows * hidden, 2);
  const std::vector<float> grad_sum = with_sum ? normal_values(rows * hidden, 3) : std::vector<float>{};
  const std::vector<float> weight = normal_values(hidden, 4);
  const NormGradients actual = run_norm(grad, grad_sum, x, weight, true);
  std::vector<double> grad_weight(hidden);
  for (int64_t t = 0; t < rows; ++t) {
    double squares = 0, products = 0;
    for (int64_t h = 0; h < hidden; ++h) {
      const int64_t i = t * hidden + h;
      squares += double(x[i]) * x[i];
      products += double(grad[i]) * weight[h] * x[i];
    }
    const double scale = 1 / std::sqrt(squares / hidden + 1e-5), mean = products * scale * scale / hidden;
    for (int64_t h = 0; h < hidden; ++h) {
      const int64_t i = t * hidden + h;
      const double expected = scale * (double(grad[i]) * weight[h] - x[i] * mean) + (with_sum ? grad_sum[i] : 0);
      EXPECT_NEAR(actual.x[i], expected, 2e-5);
      grad_weight[h] += double(grad[i]) * x[i] * scale;
    }
  }
  for (int64_t h = 0; h < hidden; ++h) EXPECT_NEAR(actual.weight[h], grad_weight[h], 1e-4);
}

TEST(RmsNormBackwardKernels, GiveTheGradientsOfRowsAndOfTheWeight) {
  expect_norm(1, 1, false);
  expect_norm(2, 700, true);
  expect_norm(70, 3, false);  // three row blocks
  expect_norm(32, 5, true);
}

TEST(RmsNormBackwardKernels, WriteOnlyTheGradientThatIsWanted) {
  const std::vector<float> grad = normal_values(80, 1), x = normal_values(80, 2), weight = normal_values(2, 3);
  const NormGradients some = run_norm(grad, {}, x, weight, false);
  EXPECT_TRUE(std::isnan(some.x[0]));
  EXPECT_EQ(some.weight, run_norm(grad, {}, x, weight, true).weight);
}

TEST(Division, IsRoundedToNearestWhateverTheEstimateOfTheReciprocal) {
  const auto expect_exact = [](float a, float b) {
    const float reciprocal = 1.0f / b;
    for (const float estimate : {reciprocal, std::nextafter(reciprocal, 0.0f), std::nextafter(reciprocal, 2.0f)})
      ASSERT_EQ(corrected_quotient(a, b, estimate), a / b) << a << " / " << b << ", estimate " << estimate;
  };
  std::mt19937 random(1);
  std::uniform_real_distribution<float> mantissa(1.0f, 2.0f);
  for (int i = 0; i < 200000; ++i) {
    const float a = std::ldexp(mantissa(random), static_cast<int>(random() % 170) - 70);
    const float b = std::ldexp(mantissa(random), static_cast<int>(random() % 24));
    expect_exact(i % 2 ? a : -a, b);
    expect_exact(mantissa(random), std::nextafter(std::ldexp(1.0f, 1 + i % 23), 0.0f));  // the hardest: all bits set
    expect_exact(1.0f, mantissa(random));
  }
  expect_exact(0.0f, 1.0f);
  for (int i = 0; i < 1000; ++i) {  // results near or below the smallest normal number
    const float a = std::ldexp(mantissa(random), -149 + i % 79), b = 8 * mantissa(random);
    EXPECT_NEAR(divide(a, b), a / b, std::nextafter(a / b, 1.0f) - a / b);
  }
  EXPECT_TRUE(std::isnan(divide(NAN, 2.0f)) && std::isnan(divide(1.0f, NAN)) && std::isnan(divide(0.0f, 0.0f)));
}

TEST(SwigluBackwardKernel, GivesTheGradientsOfGateAndValue) {
  constexpr int64_t kRows = 3, kIntermediate = 600;
  const std::vector<float> grad = normal_values(kRows * kIntermediate, 1);
  std::vector<float> gate_up = normal_values(2 * kRows * kIntermediate, 2);
  gate_up[0] = 200.0f;
  gate_up[1] = -200.0f;
  gate_up[2] = -1e30f;  // exp(-gate) is infinite
  std::vector<float> out(gate_up.size(), NAN);
  emulator::launch({{kRows, 2, 1}, kSwigluBackwardThreads, 0, 0},
                   [&] { swiglu_backward_elementwise_kernel(grad.data(), gate_up.data(), out.data(), kIntermediate); });
  for (int64_t m = 0; m < kRows; ++m) {
    for (int64_t i = 0; i < kIntermediate; ++i) {
      const int64_t gate_at = m * 2 * kIntermediate + i, up_at = gate_at + kIntermediate;
      const double upper = grad[m * kIntermediate + i], gate = gate_up[gate_at], up = gate_up[up_at];
      const double sigmoid = 1 / (1 + std::exp(-gate));
      EXPECT_NEAR(out[gate_at], upper * up * sigmoid * (1 + gate * (1 - sigmoid)), 1e-5);
      EXPECT_NEAR(out[up_at], upper * gate * sigmoid, 1e-5 * (1 + std::abs(gate)));
    }
  }
}

// What is wanted of the step between moe_mlp's products, and whether its activation was kept.
struct MoeStep {
  bool grad_gate_up, grad_weights, weighted, kept;
};

template <typename T>
void expect_near(T actual, double expected, const char* name, int64_t at) {
  const double rounding = sizeof(T) == sizeof(float) ? 1e-5 : 1.0 / 256;  // of bf16, once
  EXPECT_NEAR(float(actual), expected, 1.01 * rounding * std::abs(expected) + 1e-5) << name << " " << at;
}

template <typename T>
void expect_moe_activation(const MoeStep& step) {
  // Copy 1 was dropped, and row 2 is nobody's.
  const std::vector<int32_t> row_map{3, -1, 0, 4, 1, 5};
  const std::vector<float> weights{0.25f, 0.75f, 0.5f, -0.3f, 1.0f, 0.0f};
  constexpr int64_t kRows = 6, kSize = 300;  // more than a block has threads
  const auto values = [](int64_t count, unsigned seed) {
    const std::vector<float> wide = normal_values(count, seed);
    return std::vector<T>(wide.begin(), wide.end());
  };
  const std::vector<T> gate_up = values(2 * kRows * kSize, 1), grad = values(kRows * kSize, 2);
  const std::vector<T> kept = values(kRows * kSize, 3);  // no swiglu of gate_up: the kernel must not compute it again
  std::vector<T> weighted = grad, grad_gate_up(gate_up.size(), T(NAN));
  std::vector<float> grad_weights(row_map.size(), NAN);
  const MoeActivationGradient<T> gradient{row_map.data(),
                                          weights.data(),
                                          gate_up.data(),
                                          step.kept ? kept.data() : nullptr,
                                          weighted.data(),
                                          step.grad_gate_up ? grad_gate_up.data() : nullptr,
                                          step.grad_weights ? grad_weights.data() : nullptr,
                                          step.weighted,
                                          static_cast<int64_t>(row_map.size()),
                                          kSize};
  emulator::launch({{static_cast<unsigned>(row_map.size()), 1, 1}, kMoeBackwardThreads, 0, 4},
                   [&] { moe_activation_backward_kernel(gradient); });

  for (size_t copy = 0; copy < row_map.size(); ++copy) {
    const int64_t row = row_map[copy];
    double product = 0;
    for (int64_t i = 0; row >= 0 && i < kSize; ++i) {
      const int64_t at = row * kSize + i, gate_at = row * 2 * kSize + i, up_at = gate_at + kSize;
      const double gate = gate_up[gate_at], up = gate_up[up_at], sigmoid = 1 / (1 + std::exp(-gate));
      const double upper = double(weights[copy]) * grad[at];
      const double activated = step.kept ? float(kept[at]) : float(T(static_cast<float>(gate * sigmoid * up)));
      product += double(grad[at]) * activated;
      if (step.weighted) {
        expect_near(weighted[at], weights[copy] * activated, "weighted", at);
      } else {
        EXPECT_EQ(weighted[at], grad[at]);
      }
      if (step.grad_gate_up) {
        expect_near(grad_gate_up[gate_at], upper * up * sigmoid * (1 + gate * (1 - sigmoid)), "gate", gate_at);
        expect_near(grad_gate_up[up_at], upper * gate * sigmoid, "up", up_at);
      }
    }
    if (step.grad_weights) {
      EXPECT_NEAR(grad_weights[copy], product, 1e-4);
    }
  }
  // What is not wanted is left alone.
  for (int64_t i = 2 * kSize; i < 3 * kSize; ++i) EXPECT_EQ(weighted[i], grad[i]);
  for (int64_t i = 4 * kSize; i < 6 * kSize; ++i) EXPECT_TRUE(std::isnan(float(grad_gate_up[i])));
}

TEST(MoeActivationBackwardKernel, GivesWhatIsWantedOfTheRowsOfAllCopies) {
  for (int wanted = 0; wanted < 16; ++wanted) {
    const MoeStep step{(wanted & 1) != 0, (wanted & 2) != 0, (wanted & 4) != 0, (wanted & 8) != 0};
    SCOPED_TRACE(testing::Message() << "wanted " << wanted);
    expect_moe_activation<float>(step);
    expect_moe_activation<BFloat16>(step);
  }
}

}  // namespace
}  // namespace mixtral::cuda
