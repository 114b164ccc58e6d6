// Calibrated roundings: less error where the inputs are, the format unchanged, and the nearest where nothing is known.
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>

#include "checkpoint/calibrate.h"
#include "tiny_model.h"

namespace mixtral {
namespace {

// The values of packed blocks [N/32,...] -> f32 [N,K]
torch::Tensor values_of(const torch::Tensor& packed) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mixtral::unpack_weight", "")
                             .typed<torch::Tensor(const torch::Tensor&)>();
  return op.call(packed.unsqueeze(0)).squeeze(0).to(torch::kFloat32);
}

torch::Tensor random_normal(at::IntArrayRef sizes, uint64_t seed) {
  auto generator = torch::make_generator<torch::CPUGeneratorImpl>(seed);
  return torch::randn(sizes, generator);
}

// Inputs as layers see them: correlated, and some far larger than others. -> [T,K]
torch::Tensor correlated_inputs(int64_t count, int64_t depth) {
  const auto mix = random_normal({depth / 2, depth}, 1) * torch::linspace(0.1, 3, depth);
  return random_normal({count, depth / 2}, 2).mm(mix) + 0.1 * random_normal({count, depth}, 3);
}

double output_error(const torch::Tensor& inputs, const torch::Tensor& rows, const torch::Tensor& packed) {
  return inputs.mm((rows - values_of(packed)).t()).square().sum().item<double>();
}

TEST(Calibrate, ResultsErrLessThanWithTheNearest) {
  const auto rows = random_normal({64, 160}, 4), inputs = correlated_inputs(1000, 160);
  const auto nearest = pack_rows(rows, Packing::kInt4);
  const auto calibrated = pack_rows_calibrated(rows, gram_matrix(inputs));
  EXPECT_EQ(calibrated.sizes(), nearest.sizes());
  EXPECT_EQ(calibrated.scalar_type(), nearest.scalar_type());
  EXPECT_LT(output_error(inputs, rows, calibrated), 0.6 * output_error(inputs, rows, nearest));
  EXPECT_GT(torch::mse_loss(rows, values_of(calibrated)).item<double>(),
            torch::mse_loss(rows, values_of(nearest)).item<double>());
}

// Without correlations there is nothing to make up for: what is left is the choice among more scales.
TEST(Calibrate, UncorrelatedInputsErrAsWithTheNearest) {
  const auto rows = random_normal({64, 96}, 4), gram = torch::eye(96);
  const double nearest = torch::mse_loss(rows, values_of(pack_rows(rows, Packing::kInt4))).item<double>();
  const double calibrated = torch::mse_loss(rows, values_of(pack_rows_calibrated(rows, gram))).item<double>();
  EXPECT_LE(calibrated, nearest);
  EXPECT_GT(calibrated, 0.97 * nearest);
}

TEST(Calibrate, FewerInputsThanDepths) {
  const auto rows = random_normal({32, 96}, 4), inputs = correlated_inputs(5, 96);
  const auto calibrated = pack_rows_calibrated(rows, gram_matrix(inputs));
  EXPECT_LT(output_error(inputs, rows, calibrated), 0.1 * output_error(inputs, rows, pack_rows(rows, Packing::kInt4)));
}

TEST(Calibrate, GramMatrixOfManyInputs) {
  const auto inputs = correlated_inputs(5000, 32).to(torch::kBFloat16);
  const auto exact = inputs.to(torch::kFloat64);
  EXPECT_TRUE(torch::allclose(gram_matrix(inputs).to(torch::kFloat64), exact.t().mm(exact), 1e-4, 1e-2));
  EXPECT_TRUE(torch::equal(gram_matrix(inputs.narrow(0, 0, 0)), torch::zeros({32, 32})));
}

}  // namespace
}  // namespace mixtral
